// What the kernels of all instruction sets share: arguments, and conversions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))

constexpr float kLog2E = 1.44269504f;
// As in conditions.py, in base 2.
constexpr float kMasked = -1e30f * kLog2E;
constexpr float kLeast = kMasked / 2;

INLINE float to_float(float x) { return x; }
INLINE float to_float(uint16_t x) {  // bfloat16
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
template <typename T>
INLINE T from_float(float x);
template <>
INLINE float from_float<float>(float x) {
  return x;
}
template <>
INLINE uint16_t from_float<uint16_t>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// A bijective hash of 32 bits, in place (Wellons 2018, "lowbias32").
template <typename T>
INLINE void mix(T& x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x = x ^ (x >> 16);
}

// An array whose axes broadcast to [rows, heads, queries, keys], by strides.
template <typename T>
struct Strided {
  T* array;
  const int32_t* rows;  // which row of the array each batch row reads
  int64_t row, head, query, key;

  T* at(int64_t n, int64_t h, int64_t q, int64_t k) const {
    return array + rows[n] * row + h * head + q * query + k * key;
  }
};

// Drops weights by a hash of their position; see dropout.py.
struct Dropout {
  const uint32_t* numbers;  // two seeds, the first query and key; null: none
  uint32_t stride, threshold;
  float factor;  // of the weights that are kept

  // The part of the hash that a head and a query determine.
  uint32_t line(int64_t head, int64_t query) const {
    uint32_t position = numbers[2] + stride * static_cast<uint32_t>(query);
    uint32_t hash = static_cast<uint32_t>(head) + numbers[0];
    mix(hash);
    hash = (hash ^ position) + numbers[1];
    mix(hash);
    return hash;
  }
};

// The arguments of attention.
struct Call {
  int64_t rows, queries, keys, heads, groups, key_size, value_size;
  const void *query, *key, *value;
  bool is_cache;  // key [rows, groups, size, keys], value [rows, groups, keys, size]
  Strided<const float> bias;
  Strided<const uint8_t> mask;
  const int32_t* ranges;  // [rows, queries, 2]: first and last key
  const int32_t *query_ids, *key_ids;
  const float* sinks;
  float scale, logit_cap;
  Dropout dropout;

  int64_t shared() const { return heads / groups; }
  // Queries are multiplied by it; a cap comes between products and logits.
  float factor() const { return logit_cap > 0 ? 1 : scale * kLog2E; }
};

// A query of one head, and the first and last key that it may attend to.
struct Line {
  int64_t at;  // in an array [rows, queries, heads]
  int32_t head, query, low, high;
};

// Some queries of one key head: those of its first query head, then those of
// the second, and so on; [start, start + count) of them.
struct Chunk {
  const Call& call;
  int64_t row, group;
  std::vector<Line>& lines;  // memory that a thread keeps

  Chunk(const Call& call, int64_t row, int64_t group, int64_t start,
        int64_t count)
      : call(call), row(row), group(group), lines(memory()) {
    lines.resize(count);
    int64_t head = group * call.shared() + start / call.queries;
    int64_t query = start % call.queries;
    for (Line& line : lines) {
      int64_t position = row * call.queries + query;
      int32_t low = 0, high = call.keys - 1;
      if (call.ranges) {
        low = std::max(low, call.ranges[2 * position]);
        high = std::min(high, call.ranges[2 * position + 1]);
      }
      line = {position * call.heads + head, static_cast<int32_t>(head),
              static_cast<int32_t>(query), low, high};
      if (++query == call.queries) query = 0, ++head;
    }
  }
  static std::vector<Line>& memory() {
    thread_local std::vector<Line> lines;
    return lines;
  }
};

// The results of a backward pass, and what it needs beside the arguments.
struct Gradients {
  const void* output;
  const void* d_output;
  const float* tops;
  const float* log_totals;
  void* d_query;
  float* d_key;      // of this split, [rows, keys, groups, key_size]
  float* d_value;
  float* deltas;     // [rows, queries, heads]
  Strided<float> d_bias;  // of this share
};

// x [rows, depth] times weights [depth, columns], or [columns, depth] if they
// are transposed.
struct Product {
  int64_t rows, depth, columns;
  bool is_transposed;
  const void* weights;
  const float* x = nullptr;
  float* output = nullptr;
};

// The kernels for one instruction set.
struct Kernels {
  struct Attention {
    void (*forward)(const Chunk&, void* output, float* tops, float* log_totals);
    void (*backward)(const Chunk&, const Gradients&);
  };
  using Columns = void(const Product&, int64_t first, int64_t count);

  const char* instruction_set;
  Attention float32, bfloat16;
  Columns *product_float32, *product_bfloat16;

  const Attention& of(bool is_float32) const {
    return is_float32 ? float32 : bfloat16;
  }
};

const Kernels& kernels();  // of the best instruction set that this machine has

constexpr int64_t kQueries = 48;  // in a block
constexpr int64_t kKeys = 64;
constexpr int64_t kAhead = 16;  // rows that are asked for in advance
constexpr int64_t kChunk = 512;  // queries that share a packed block of keys
// Pairs of queries and keys below which other threads would come too late.
constexpr int64_t kSmall = 1 << 14;
