// The kernels, compiled for each instruction set.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "call.h"

// Functions between these two may use some further instructions.
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET(flags) \
  PRAGMA(clang attribute push(__attribute__((target(flags))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define TARGET(flags) PRAGMA(GCC push_options) PRAGMA(GCC target(flags))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)
TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
namespace avx512 {
#define LANES 16
#define REGISTERS 32
#include "vectors.h"
#include "attention.h"
#include "product.h"
#undef LANES
#undef REGISTERS
}  // namespace avx512
END_TARGET

TARGET("avx2,fma")
namespace avx2 {
#define LANES 8
#define REGISTERS 16
#include "vectors.h"
#include "attention.h"
#include "product.h"
#undef LANES
#undef REGISTERS
}  // namespace avx2
END_TARGET
#endif

namespace baseline {
#define LANES 4
#if defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#include "vectors.h"
#include "attention.h"
#include "product.h"
#undef LANES
#undef REGISTERS
}  // namespace baseline

// The best instruction set that the processor has, up to the one that the
// environment variable ATTENTION_INSTRUCTION_SET names, for tests.
const Kernels& kernels() {
  static const Kernels best = [] {
#if defined(__x86_64__)
    const char* asked = std::getenv("ATTENTION_INSTRUCTION_SET");
    auto is = [&](const char* name) {
      return asked && std::strcmp(asked, name) == 0;
    };
    if (!is("baseline") && !is("AVX2") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      return avx512::kernels("AVX-512");
    if (!is("baseline") && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma"))
      return avx2::kernels("AVX2");
#endif
    return baseline::kernels("baseline");
  }();
  return best;
}
