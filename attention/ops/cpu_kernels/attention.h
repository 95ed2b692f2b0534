// Attention and its gradient on a CPU, in blocks of queries × keys.
//
// kernels.cc includes this file once for each instruction set, after vectors.h.
// Logits are base 2: exp(x) = 2^(x log2 e). As in the other kernels, a forward
// pass returns the largest logit and the logarithm of the denominator relative
// to it, from which the backward pass recomputes the weights.

INLINE int64_t padded(int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// Float32 memory that a thread keeps between calls.
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    thread_local std::vector<float> memory;
    size += kLanes;
    if ((int64_t)memory.size() < size) memory.resize(size);
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    uintptr_t alignment = 4 * kLanes;
    next_ = memory.data() + (alignment - address % alignment) % alignment / 4;
  }
  // `rows` rows of a multiple of kLanes floats.
  float* take(int64_t rows, int64_t row) {
    float* taken = next_;
    next_ += rows * row;
    return taken;
  }

 private:
  float* next_;
};

// A block of a chunk's queries: the keys that any and that all may attend to.
struct Block {
  const Line* lines;
  int64_t first, count;
  int64_t low, high, whole_low, whole_high;

  Block(const Chunk& chunk, int64_t first)
      : lines(chunk.lines.data() + first), first(first) {
    count = std::min<int64_t>(kQueries, chunk.lines.size() - first);
    low = whole_high = chunk.call.keys - 1;
    high = whole_low = 0;
    bool is_empty = true;
    for (const Line* line = lines; line < lines + count; ++line) {
      whole_low = std::max<int64_t>(whole_low, line->low);
      whole_high = std::min<int64_t>(whole_high, line->high);
      if (line->low > line->high) continue;
      low = is_empty ? line->low : std::min<int64_t>(low, line->low);
      high = is_empty ? line->high : std::max<int64_t>(high, line->high);
      is_empty = false;
    }
    if (is_empty) low = 1, high = 0;
  }
};

// Asks for a row in advance: rows of one head are apart, where the processor
// does not foresee them.
template <typename T>
INLINE void prefetch(const T* row, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 64 / sizeof(T))
    __builtin_prefetch(row + j);
}

template <typename T>
void pack(const T* x, int64_t x_row, float* y, int64_t y_row, int64_t rows,
          int64_t columns, float factor = 1) {
  for (int64_t i = 0; i < rows; ++i) {
    prefetch(x + (i + kAhead) * x_row, columns);
    for (int64_t j = 0; j < columns; ++j)
      y[i * y_row + j] = factor * to_float(x[i * x_row + j]);
    for (int64_t j = columns; j < padded(columns); ++j) y[i * y_row + j] = 0;
  }
}

// y = xᵀ, in rows of y_row, with zeros up to a whole vector.
template <typename T>
void pack_transposed(const T* x, int64_t x_row, float* y, int64_t y_row,
                     int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns && rows < padded(rows); ++j)
    std::memset(y + j * y_row + rows, 0, 4 * (padded(rows) - rows));
  for (int64_t i = 0; i < rows; ++i) {
    prefetch(x + (i + kAhead) * x_row, columns);
    for (int64_t j = 0; j < columns; ++j)
      y[j * y_row + i] = to_float(x[i * x_row + j]);
  }
}

template <typename T>
void pack_queries(const Chunk& chunk, const void* x, float* y, int64_t size,
                  float factor) {
  auto array = static_cast<const T*>(x);
  int64_t n = 0, last = chunk.lines.size() - 1;
  for (const Line& line : chunk.lines) {
    prefetch(array + chunk.lines[std::min(n + kAhead, last)].at * size, size);
    pack(array + line.at * size, 0, y + n++ * padded(size), padded(size), 1,
         size, factor);
  }
}

// A matrix in memory, in rows of `row` floats.
struct Matrix {
  const float* x;
  int64_t row;
};

// `count` keys or values of one head from `key` on.
template <typename T>
struct Keys {
  const T* x;
  int64_t count, size, x_row, x_column;

  Keys(const Chunk& chunk, const void* array, int64_t key, int64_t count,
       int64_t size, bool is_transposed)
      : count(count), size(size) {
    const Call& call = chunk.call;
    x = static_cast<const T*>(array);
    if (!call.is_cache) {
      x += ((chunk.row * call.keys + key) * call.groups + chunk.group) * size;
      x_row = call.groups * size, x_column = 1;
      return;
    }
    x += (chunk.row * call.groups + chunk.group) * call.keys * size;
    x += is_transposed ? key : key * size;
    x_row = is_transposed ? 1 : size;
    x_column = is_transposed ? call.keys : 1;
  }
  // [count, size], packed into y.
  Matrix rows(float* y) const {
    if (x_column == 1)
      pack(x, x_row, y, padded(size), count, size);
    else
      pack_transposed(x, x_column, y, padded(size), size, count);
    return {y, padded(size)};
  }
  // [size, count], packed into y.
  Matrix columns(float* y) const {
    if (x_column == 1)
      pack_transposed(x, x_row, y, kKeys, count, size);
    else
      pack(x, x_column, y, kKeys, size, count);
    return {y, kKeys};
  }
  // The same in place, or packed where that is not possible.
  Matrix rows_in_place(float* y) const {
    if constexpr (std::is_same_v<T, float>)
      if (x_column == 1 && size == padded(size)) return {x, x_row};
    return rows(y);
  }
  Matrix columns_in_place(float* y) const {
    if constexpr (std::is_same_v<T, float>)
      if (x_row == 1 && count == padded(count)) return {x, x_column};
    return columns(y);
  }
};

// Turns products into logits, in place: [block.count, width] for the `count`
// keys from `key` on. Stores the cap's derivative in `slopes` unless it is null.
inline void finish_logits(const Chunk& chunk, const Block& block, int64_t key,
                          int64_t count, float* logits, int64_t width,
                          float* slopes) {
  const Call& call = chunk.call;
  bool is_whole = block.whole_low <= key && block.whole_high >= key + count - 1;
  is_whole = is_whole && count == width && !call.mask.array && !call.query_ids;
  if (is_whole && call.logit_cap == 0 && !call.bias.array) return;
  for (int64_t r = 0; r < block.count; ++r) {
    const Line& line = block.lines[r];
    float* x = logits + r * kKeys;
    if (call.logit_cap > 0) {
      float before = call.scale / call.logit_cap;
      for (int64_t j = 0; j < width; j += kLanes) {
        Vector y = tanh(load(x + j) * before);
        store(x + j, y * (call.logit_cap * kLog2E));
        if (slopes) store(slopes + r * kKeys + j, 1.0f - y * y);
      }
    }
    if (call.bias.array) {
      const float* bias = call.bias.at(chunk.row, line.head, line.query, key);
      if (call.bias.key == 0) {
        Vector y = broadcast(*bias * kLog2E);
        for (int64_t j = 0; j < width; j += kLanes) store(x + j, load(x + j) + y);
      } else {
        int64_t j = 0;
        for (; j + kLanes <= count; j += kLanes)
          store(x + j, load(x + j) + load(bias + j) * kLog2E);
        for (; j < count; ++j) x[j] += bias[j] * kLog2E;
      }
    }
    if (is_whole) continue;
    int64_t low = std::min<int64_t>(line.low - key, width);
    int64_t high = std::min<int64_t>(line.high - key, count - 1);
    for (int64_t j = 0; j < low; ++j) x[j] = kMasked;
    for (int64_t j = std::max<int64_t>(high + 1, 0); j < width; ++j)
      x[j] = kMasked;
    if (call.mask.array) {
      const uint8_t* mask = call.mask.at(chunk.row, line.head, line.query, key);
      for (int64_t j = 0; j < count; ++j)
        x[j] = mask[j * call.mask.key] ? x[j] : kMasked;
    }
    if (call.query_ids) {
      int32_t id = call.query_ids[chunk.row * call.queries + line.query];
      const int32_t* ids = call.key_ids + chunk.row * call.keys + key;
      for (int64_t j = 0; j < count; ++j) x[j] = ids[j] == id ? x[j] : kMasked;
    }
  }
}

// Factors of the weights of a query, for kLanes keys from `key` on.
INLINE Vector dropout_factors(const Dropout& dropout, uint32_t line,
                              int64_t key) {
  Unsigned positions;
  for (int i = 0; i < kLanes; ++i) positions[i] = key + i;
  positions = positions * dropout.stride + dropout.numbers[3];
  Unsigned bits = positions + dropout.numbers[0];
  mix(bits);
  bits ^= line;
  mix(bits);
  return bits >= dropout.threshold ? broadcast(dropout.factor) : Vector{};
}

// Whether a dense mask excludes all pairs of the block.
inline bool is_masked(const Chunk& chunk, const Block& block, int64_t key,
                      int64_t count) {
  const auto& mask = chunk.call.mask;
  if (!mask.array) return false;
  const uint8_t* last = nullptr;
  for (const Line* line = block.lines; line < block.lines + block.count; ++line) {
    const uint8_t* x = mask.at(chunk.row, line->head, line->query, key);
    if (x == last) continue;
    last = x;
    uint8_t any = 0;
    for (int64_t j = 0; j < (mask.key ? count : 1); ++j) any |= x[j];
    if (any) return false;
  }
  return true;
}

inline const std::vector<Block>& blocks_of(const Chunk& chunk) {
  thread_local std::vector<Block> blocks;
  blocks.clear();
  int64_t lines = chunk.lines.size();
  for (int64_t first = 0; first < lines; first += kQueries)
    blocks.emplace_back(chunk, first);
  return blocks;
}

// The first and the last key that any block may attend to.
inline std::pair<int64_t, int64_t> keys_of(const std::vector<Block>& blocks,
                                           int64_t keys) {
  int64_t low = keys, high = -1;
  for (const Block& block : blocks)
    low = std::min(low, block.low), high = std::max(high, block.high);
  return {low, high};
}

template <typename T>
void forward(const Chunk& chunk, void* output, float* tops, float* log_totals) {
  const Call& call = chunk.call;
  const int64_t d = padded(call.key_size), e = padded(call.value_size);
  const int64_t lines = chunk.lines.size(), most = padded(lines);
  Scratch scratch(lines * (d + e + kLanes) + most +
                  kKeys * (call.key_size + e + kQueries));
  float* queries = scratch.take(lines, d);
  float* sums = scratch.take(lines, e);
  float* top = scratch.take(1, most);
  float* totals = scratch.take(lines, kLanes);  // a vector of parts each
  float* packed_keys = scratch.take(call.key_size, kKeys);
  float* packed_values = scratch.take(kKeys, e);
  float* weights = scratch.take(kQueries, kKeys);
  pack_queries<T>(chunk, call.query, queries, call.key_size, call.factor());
  std::memset(sums, 0, 4 * lines * e);
  std::fill(top, top + most, kLeast);
  std::memset(totals, 0, 4 * lines * kLanes);
  const auto& blocks = blocks_of(chunk);
  const auto [low, high] = keys_of(blocks, call.keys);

  for (int64_t key = low / kKeys * kKeys; key <= high; key += kKeys) {
    int64_t packed = std::min(kKeys, call.keys - key);
    bool is_packed = false;
    Matrix keys, values;
    for (const Block& block : blocks) {
      if (block.low >= key + packed || block.high < key) continue;
      // Causal blocks leave out the keys after their last query.
      int64_t count = std::min(packed, block.high + 1 - key);
      int64_t width = padded(count);
      if (is_masked(chunk, block, key, count)) continue;
      if (!is_packed) {
        Keys<T> k(chunk, call.key, key, packed, call.key_size, true);
        Keys<T> v(chunk, call.value, key, packed, call.value_size, false);
        keys = call.is_cache ? k.columns_in_place(packed_keys)
                             : k.columns(packed_keys);
        values = call.is_cache ? v.rows_in_place(packed_values)
                               : v.rows(packed_values);
        is_packed = true;
      }
      multiply<false>(weights, kKeys, queries + block.first * d, d, 1, keys.x,
                      keys.row, block.count, width, call.key_size);
      finish_logits(chunk, block, key, count, weights, width, nullptr);
      for (int64_t r = 0; r < block.count; ++r) {
        float* x = weights + r * kKeys;
        int64_t n = block.first + r;
        Vector largest = load(x);
        for (int64_t j = kLanes; j < width; j += kLanes)
          largest = maximum(largest, load(x + j));
        float new_top = maximum(largest);
        if (!(new_top <= top[n])) {
          Vector shrink = exp2(broadcast(top[n] - new_top));
          store(totals + n * kLanes, load(totals + n * kLanes) * shrink);
          for (int64_t c = 0; c < e; c += kLanes)
            store(sums + n * e + c, load(sums + n * e + c) * shrink);
          top[n] = new_top;
        }
        Vector total = load(totals + n * kLanes);
        for (int64_t j = 0; j < width; j += kLanes) {
          Vector y = exp2(load(x + j) - top[n]);
          store(x + j, y);
          total += y;
        }
        store(totals + n * kLanes, total);
        if (!call.dropout.numbers) continue;
        const Line& line = block.lines[r];
        uint32_t hash = call.dropout.line(chunk.row * call.heads + line.head,
                                          line.query);
        for (int64_t j = 0; j < width; j += kLanes)
          store(x + j,
                load(x + j) * dropout_factors(call.dropout, hash, key + j));
      }
      multiply<true>(sums + block.first * e, e, weights, kKeys, 1, values.x,
                     values.row, block.count, e, count);
    }
  }

  for (int64_t n = 0; n < lines; ++n) {
    const Line& line = chunk.lines[n];
    float total = sum(load(totals + n * kLanes));
    if (call.sinks)
      total += std::exp2(call.sinks[line.head] * kLog2E - top[n]);
    // With an infinite denominator, fully masked rows have no weights.
    if (total == 0) total = INFINITY;
    tops[line.at] = top[n];
    log_totals[line.at] = std::log2(total);
    T* y = static_cast<T*>(output) + line.at * call.value_size;
    for (int64_t c = 0; c < call.value_size; ++c)
      y[c] = from_float<T>(sums[n * e + c] / total);
  }
}

// Adds the gradients of the queries of a chunk.
template <typename T>
void backward(const Chunk& chunk, const Gradients& gradients) {
  const Call& call = chunk.call;
  const int64_t d = padded(call.key_size), e = padded(call.value_size);
  const int64_t lines = chunk.lines.size(), most = padded(lines);
  Scratch scratch(lines * (2 * d + e) + 2 * most +
                  kKeys * (call.key_size + call.value_size + 2 * d + e) +
                  3 * kQueries * kKeys);
  float* queries = scratch.take(lines, d);
  float* d_queries = scratch.take(lines, d);
  float* d_outputs = scratch.take(lines, e);
  float* deltas = scratch.take(1, most);
  float* keys_t = scratch.take(call.key_size, kKeys);
  float* values_t = scratch.take(call.value_size, kKeys);
  float* keys = scratch.take(kKeys, d);
  float* d_keys = scratch.take(kKeys, d);
  float* d_values = scratch.take(kKeys, e);
  float* weights = scratch.take(kQueries, kKeys);
  float* d_weights = scratch.take(kQueries, kKeys);
  float* slopes = scratch.take(kQueries, kKeys);
  pack_queries<T>(chunk, call.query, queries, call.key_size, call.factor());
  pack_queries<T>(chunk, gradients.d_output, d_outputs, call.value_size, 1);
  std::memset(d_queries, 0, 4 * lines * d);
  for (int64_t n = 0; n < lines; ++n) {
    int64_t at = chunk.lines[n].at;
    const T* y = static_cast<const T*>(gradients.output) + at * call.value_size;
    float total = 0;  // Σ weight · d_weight, from the output (Dao et al. 2022)
    for (int64_t c = 0; c < call.value_size; ++c)
      total += d_outputs[n * e + c] * to_float(y[c]);
    gradients.deltas[at] = deltas[n] = total;
  }
  const auto& blocks = blocks_of(chunk);
  const auto [low, high] = keys_of(blocks, call.keys);

  for (int64_t key = low / kKeys * kKeys; key <= high; key += kKeys) {
    int64_t packed = std::min(kKeys, call.keys - key);
    bool is_packed = false;
    for (const Block& block : blocks) {
      if (block.low >= key + packed || block.high < key) continue;
      // Causal blocks leave out the keys after their last query.
      int64_t count = std::min(packed, block.high + 1 - key);
      int64_t width = padded(count);
      if (is_masked(chunk, block, key, count)) continue;
      if (!is_packed) {
        Keys<T> k(chunk, call.key, key, packed, call.key_size, true);
        Keys<T> v(chunk, call.value, key, packed, call.value_size, false);
        k.columns(keys_t);
        k.rows(keys);
        v.columns(values_t);
        std::memset(d_keys, 0, 4 * packed * d);
        std::memset(d_values, 0, 4 * packed * e);
        is_packed = true;
      }
      const float* q = queries + block.first * d;
      const float* d_out = d_outputs + block.first * e;
      multiply<false>(weights, kKeys, q, d, 1, keys_t, kKeys, block.count,
                      width, call.key_size);
      multiply<false>(d_weights, kKeys, d_out, e, 1, values_t, kKeys,
                      block.count, width, call.value_size);
      finish_logits(chunk, block, key, count, weights, width, slopes);
      for (int64_t r = 0; r < block.count; ++r) {
        const Line& line = block.lines[r];
        float* x = weights + r * kKeys;
        float* dx = d_weights + r * kKeys;
        // One after the other: a bias of -1e9 would round the sum.
        float top = gradients.tops[line.at];
        float log_total = gradients.log_totals[line.at];
        float delta = deltas[block.first + r];
        bool drops = call.dropout.numbers;
        uint32_t hash = 0;
        if (drops)
          hash = call.dropout.line(chunk.row * call.heads + line.head,
                                   line.query);
        for (int64_t j = 0; j < width; j += kLanes) {
          Vector weight = exp2((load(x + j) - top) - log_total);
          Vector factor = broadcast(1);
          if (drops) factor = dropout_factors(call.dropout, hash, key + j);
          store(x + j, weight * factor);
          store(dx + j, weight * (load(dx + j) * factor - delta));
        }
        if (gradients.d_bias.array) {
          float* y = gradients.d_bias.at(chunk.row, line.head, line.query, key);
          if (gradients.d_bias.key == 0) {
            Vector part = {};
            for (int64_t j = 0; j < width; j += kLanes) part += load(dx + j);
            *y += sum(part);
          } else {
            int64_t j = 0;
            for (; j + kLanes <= count; j += kLanes)
              store(y + j, load(y + j) + load(dx + j));
            for (; j < count; ++j) y[j] += dx[j];
          }
        }
        if (call.logit_cap > 0)
          for (int64_t j = 0; j < width; j += kLanes)
            store(dx + j, load(dx + j) * load(slopes + r * kKeys + j));
      }
      multiply<true>(d_values, e, weights, 1, kKeys, d_out, e, count, e,
                     block.count);
      multiply<true>(d_keys, d, d_weights, 1, kKeys, q, d, count, d,
                     block.count);
      multiply<true>(d_queries + block.first * d, d, d_weights, kKeys, 1, keys,
                     d, block.count, d, count);
    }
    if (!is_packed) continue;
    // The packed queries are scaled already, and in base 2.
    float factor = call.logit_cap > 0 ? call.scale : 1 / kLog2E;
    for (int64_t j = 0; j < packed; ++j) {
      int64_t at = (chunk.row * call.keys + key + j) * call.groups + chunk.group;
      float* d_k = gradients.d_key + at * call.key_size;
      float* d_v = gradients.d_value + at * call.value_size;
      for (int64_t c = 0; c < call.key_size; ++c)
        d_k[c] += factor * d_keys[j * d + c];
      for (int64_t c = 0; c < call.value_size; ++c)
        d_v[c] += d_values[j * e + c];
    }
  }

  for (int64_t n = 0; n < lines; ++n) {
    T* y = static_cast<T*>(gradients.d_query) + chunk.lines[n].at * call.key_size;
    for (int64_t c = 0; c < call.key_size; ++c)
      y[c] = from_float<T>(call.scale * d_queries[n * d + c]);
  }
}
