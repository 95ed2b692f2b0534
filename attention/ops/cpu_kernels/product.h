// Products of few rows with a large matrix, which take as long as reading it.
//
// kernels.cc includes this file once for each instruction set, after attention.h.

constexpr int64_t kFar = 8;  // rows of the matrix that are asked for in advance
constexpr int64_t kPanel = 64;  // rows of the matrix that are kept in the cache

// Whole vectors of columns of y = x w, for more rows than one block holds: each
// panel of w is read once and kept in the cache for all rows.
template <typename W>
void product_panels(const float* x, const W* w, int64_t w_row, float* y,
                    int64_t y_row, int64_t rows, int64_t depth,
                    int64_t columns) {
  Scratch scratch(kPanel * columns);
  float* panel = scratch.take(kPanel, columns);
  for (int64_t i = 0; i < rows; ++i)
    std::memset(y + i * y_row, 0, sizeof(float) * columns);
  for (int64_t first = 0; first < depth; first += kPanel) {
    int64_t count = std::min(kPanel, depth - first);
    pack(w + first * w_row, w_row, panel, columns, count, columns);
    multiply<true>(y, y_row, x + first, depth, 1, panel, columns, rows, columns,
                   count);
  }
}

// Columns of y = x w, of which there are `columns`.
template <typename W>
void product_columns(const float* x, const W* w, int64_t w_row, float* y,
                     int64_t y_row, int64_t rows, int64_t depth,
                     int64_t columns) {
  int64_t whole = columns / kLanes * kLanes;
  if (whole && rows <= kAccumulators / kMaxVectors)
    multiply<false, kFar>(y, y_row, x, depth, 1, w, w_row, rows, whole, depth);
  else if (whole)
    product_panels(x, w, w_row, y, y_row, rows, depth, whole);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = whole; j < columns; ++j) {
      float total = 0;
      for (int64_t k = 0; k < depth; ++k)
        total += x[i * depth + k] * to_float(w[k * w_row + j]);
      y[i * y_row + j] = total;
    }
}

// A block of y = x wᵀ, of `count` rows of w and `rows` rows of x.
template <int rows, int count, typename W>
INLINE void product_block(const float* x, const W* w, float* y, int64_t y_row,
                          int64_t depth) {
  Vector sums[rows][count] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vector right[count];
    for (int j = 0; j < count; ++j) {
      right[j] = load(w + j * depth + k);
      __builtin_prefetch(w + (j + count) * depth + k);
    }
    for (int i = 0; i < rows; ++i) {
      Vector left = load(x + i * depth + k);
      for (int j = 0; j < count; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < count; ++j) {
      float total = sum(sums[i][j]);
      for (int64_t l = k; l < depth; ++l)
        total += x[i * depth + l] * to_float(w[j * depth + l]);
      y[i * y_row + j] = total;
    }
}

template <typename W>
void product_rows(const float* x, const W* w, float* y, int64_t y_row,
                  int64_t rows, int64_t depth, int64_t columns) {
  int64_t j = 0;
#define ATTENTION_BLOCKS(count)                                              \
  for (; j + (count) <= columns; j += (count)) {                             \
    int64_t i = 0;                                                           \
    for (; i + 4 <= rows; i += 4)                                            \
      product_block<4, (count)>(x + i * depth, w + j * depth,                \
                                y + i * y_row + j, y_row, depth);            \
    for (; i < rows; ++i)                                                    \
      product_block<1, (count)>(x + i * depth, w + j * depth,                \
                                y + i * y_row + j, y_row, depth);            \
  }
  ATTENTION_BLOCKS(4)
  ATTENTION_BLOCKS(1)
#undef ATTENTION_BLOCKS
}

// `count` columns from `first` on.
template <typename W>
void product(const Product& call, int64_t first, int64_t count) {
  auto w = static_cast<const W*>(call.weights);
  float* y = call.output + first;
  if (call.is_transposed)
    product_rows(call.x, w + first * call.depth, y, call.columns, call.rows,
                 call.depth, count);
  else
    product_columns(call.x, w + first, call.columns, y, call.columns, call.rows,
                    call.depth, count);
}

inline Kernels kernels(const char* instruction_set) {
  return {instruction_set,
          {forward<float>, backward<float>},
          {forward<uint16_t>, backward<uint16_t>},
          product<float>,
          product<uint16_t>};
}
