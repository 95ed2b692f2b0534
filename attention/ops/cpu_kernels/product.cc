// Products of few rows with a large matrix as a foreign function of XLA.

#include <algorithm>
#include <vector>

#include "call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kColumns = 64;   // of a block that a thread computes
constexpr int64_t kSerial = 1 << 15;  // numbers that one thread reads alone

template <typename T>
void convert(const T* x, float* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = to_float(x[i]);
}

// x [rows, depth] w, for w [depth, columns], or [columns, depth] transposed.
ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::Result<ffi::AnyBuffer> y, bool is_transposed) {
  auto shape = w.dimensions();
  int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  int64_t columns = shape[is_transposed ? 0 : 1];
  bool is_float = x.element_type() == ffi::F32;
  std::vector<float> inputs, outputs;
  Product call{rows, depth, columns, is_transposed, w.untyped_data()};
  call.x = static_cast<const float*>(x.untyped_data());
  call.output = static_cast<float*>(y->untyped_data());
  if (!is_float) {
    inputs.resize(rows * depth);
    outputs.resize(rows * columns);
    convert(static_cast<const uint16_t*>(x.untyped_data()), inputs.data(),
            rows * depth);
    call.x = inputs.data(), call.output = outputs.data();
  }
  const Kernels& all = kernels();
  auto kernel = w.element_type() == ffi::F32 ? all.product_float32
                                             : all.product_bfloat16;
  int64_t blocks = (columns + kColumns - 1) / kColumns;
  for_each(pool, blocks, depth * columns < kSerial, [&](int64_t i) {
    kernel(call, i * kColumns, std::min(kColumns, columns - i * kColumns));
  });
  if (!is_float) {
    auto* result = static_cast<uint16_t*>(y->untyped_data());
    for (int64_t i = 0; i < rows * columns; ++i)
      result[i] = from_float<uint16_t>(outputs[i]);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("is_transposed"));

extern "C" __attribute__((visibility("default"))) const char*
attention_instruction_set() {
  return kernels().instruction_set;
}
