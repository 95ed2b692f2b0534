// Vectors of floats, and the products that attention and layers consist of.
//
// kernels.cc includes this file once for each instruction set, in a namespace
// of its own, after defining LANES (floats in a vector) and REGISTERS (vector
// registers). It relies on the vector extensions of GCC and Clang.

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES)));

constexpr int kLanes = LANES;
// The widest block of a product's result, in vectors, and its size in
// registers. The others hold a row of the right operand and a broadcast.
constexpr int kMaxVectors = REGISTERS == 32 ? 4 : 2;
constexpr int kAccumulators = REGISTERS == 32 ? 24 : 12;

INLINE Vector load(const float* x) {
  Vector y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

INLINE Vector load(const uint16_t* x) {  // bfloat16
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  Halves y;
  std::memcpy(&y, x, sizeof y);
  return (Vector)(__builtin_convertvector(y, Unsigned) << 16);
}

INLINE void store(float* x, Vector y) { std::memcpy(x, &y, sizeof y); }

INLINE Vector broadcast(float x) { return x - Vector{}; }

// The larger of two numbers.
INLINE Vector maximum(Vector x, Vector y) { return x > y ? x : y; }

// The largest number of a vector.
INLINE float maximum(Vector x) {
  float y[kLanes];
  store(y, x);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) y[i] = y[i] > y[i + half] ? y[i] : y[i + half];
  return y[0];
}

INLINE float sum(Vector x) {
  float y[kLanes];
  store(y, x);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) y[i] += y[i + half];
  return y[0];
}

// 2^x, within 2e-7 of it relatively; 0 below 2^-126. NaN stays NaN.
INLINE Vector exp2(Vector x) {
  // Adding 1.5 · 2^23 rounds to an integer, which the low bits then hold.
  const Vector magic = broadcast(12582912.0f);
  Vector shifted = x + magic;
  Vector f = x - (shifted - magic);
  // A least-squares fit of 2^f on [-1/2, 1/2], within 2e-9.
  Vector p = broadcast(1.53375768e-4f);
  p = p * f + 1.33998604e-3f;
  p = p * f + 9.61851953e-3f;
  p = p * f + 5.55032900e-2f;
  p = p * f + 2.40226466e-1f;
  p = p * f + 6.93147206e-1f;
  p = p * f + 1.0f;
  Integers exponent = ((Integers)shifted - (Integers)magic) << 23;
  return x < -126.0f ? Vector{} : (Vector)((Integers)p + exponent);
}

INLINE Vector tanh(Vector x) {
  // Beyond 10, 1 in float32; the bound also keeps 2^x finite.
  Vector bounded = x > 10.0f ? broadcast(10.0f) : x;
  bounded = bounded < -10.0f ? broadcast(-10.0f) : bounded;
  return 1.0f - 2.0f / (exp2(bounded * 2.8853901f) + 1.0f);
}

// A row of a block's right operand, and how a row of its result is stored.
template <int vectors>
INLINE void load_row(const float* x, Vector (&y)[vectors]) {
  for (int j = 0; j < vectors; ++j) y[j] = load(x + j * kLanes);
}

template <int vectors>
INLINE void store_row(float* y, const Vector (&x)[vectors], const float*) {
  for (int j = 0; j < vectors; ++j) store(y + j * kLanes, x[j]);
}

// Pairs of bfloat16 vectors are taken apart into even and odd columns, which
// needs no shuffles.
template <int vectors>
INLINE void load_row(const uint16_t* x, Vector (&y)[vectors]) {
  int j = 0;
  for (; j + 2 <= vectors; j += 2) {
    Unsigned both;
    std::memcpy(&both, x + j * kLanes, sizeof both);
    y[j] = (Vector)(both << 16);
    y[j + 1] = (Vector)(both & 0xffff0000u);
  }
  if (j < vectors) y[j] = load(x + j * kLanes);
}

template <int vectors>
INLINE void store_row(float* y, const Vector (&x)[vectors], const uint16_t*) {
  int j = 0;
  for (; j + 2 <= vectors; j += 2)
    for (int i = 0; i < kLanes; ++i) {
      y[j * kLanes + 2 * i] = x[j][i];
      y[j * kLanes + 2 * i + 1] = x[j + 1][i];
    }
  if (j < vectors) store(y + j * kLanes, x[j]);
}

// A block of c = a b or c += a b: `rows` × `vectors` · kLanes.
template <int rows, int vectors, bool adds, int ahead, typename B>
INLINE void multiply_block(float* c, int64_t c_row, const float* a,
                           int64_t a_row, int64_t a_column, const B* b,
                           int64_t b_row, int64_t depth) {
  static_assert(!adds || std::is_same_v<B, float>);
  Vector sums[rows][vectors] = {};
  if (adds)
    for (int i = 0; i < rows; ++i) load_row(c + i * c_row, sums[i]);
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[vectors];
    load_row(b + k * b_row, right);
    if (ahead)
      for (int64_t j = 0; j < vectors * kLanes; j += 64 / sizeof(B))
        __builtin_prefetch(b + (k + ahead) * b_row + j);
    for (int i = 0; i < rows; ++i) {
      Vector left = broadcast(a[i * a_row + k * a_column]);
      for (int j = 0; j < vectors; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < rows; ++i) store_row(c + i * c_row, sums[i], b);
}

// All rows, for columns that fill `vectors` vectors.
template <int vectors, bool adds, int ahead, typename B>
void multiply_columns(float* c, int64_t c_row, const float* a, int64_t a_row,
                      int64_t a_column, const B* b, int64_t b_row,
                      int64_t rows, int64_t depth) {
  constexpr int block = kAccumulators / vectors < 12 ? kAccumulators / vectors : 12;
  int64_t i = 0;
#define ATTENTION_ROWS(count)                                              \
  for (; i + (count) <= rows; i += (count))                                \
    multiply_block<(count), vectors, adds, ahead>(c + i * c_row, c_row, a + i * a_row,  \
                                     a_row, a_column, b, b_row, depth);
  ATTENTION_ROWS(block)
  if constexpr (block > 4) { ATTENTION_ROWS(4) }
  if constexpr (block > 2) { ATTENTION_ROWS(2) }
  ATTENTION_ROWS(1)
#undef ATTENTION_ROWS
}

// c = a b or, if it `adds`, c += a b; `columns` is a multiple of kLanes.
//
// `a` is [rows, depth] with any strides, so that it may be transposed.
// `ahead` rows of `b` are asked for in advance.
template <bool adds, int ahead = 0, typename B>
void multiply(float* c, int64_t c_row, const float* a, int64_t a_row,
              int64_t a_column, const B* b, int64_t b_row, int64_t rows,
              int64_t columns, int64_t depth) {
  int64_t vectors = columns / kLanes;
  while (vectors > 0) {
    int count = vectors < kMaxVectors ? vectors : kMaxVectors;
    switch (count) {
#define ATTENTION_COLUMNS(count)                                              \
  case count:                                                                 \
    multiply_columns<count, adds, ahead>(c, c_row, a, a_row, a_column, b, b_row, rows, depth); \
    break;
      ATTENTION_COLUMNS(1)
      ATTENTION_COLUMNS(2)
#if REGISTERS == 32
      ATTENTION_COLUMNS(3)
      ATTENTION_COLUMNS(4)
#endif
#undef ATTENTION_COLUMNS
    }
    vectors -= count;
    c += count * kLanes;
    b += count * kLanes;
  }
}
