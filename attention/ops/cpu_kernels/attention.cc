// Attention and its gradient as foreign functions of XLA.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

template <typename T>
const T* optional(const ffi::AnyBuffer& x) {
  return x.element_count() ? static_cast<const T*>(x.untyped_data()) : nullptr;
}

std::vector<ffi::AnyBuffer> buffers(ffi::RemainingArgs arguments) {
  std::vector<ffi::AnyBuffer> found;
  for (size_t i = 0; i < arguments.size(); ++i)
    found.push_back(*arguments.get<ffi::AnyBuffer>(i));
  return found;
}

// An array [rows, heads, queries, keys]; axes of size 1 broadcast. Or, with two
// axes, [heads, queries + keys - 1], by distance key - query.
template <typename T, typename U>
Strided<T> strided(T* array, U&& dims, const int32_t* rows, int64_t queries) {
  Strided<T> x{array, rows, 0, 0, 0, 0};
  if (!array) return x;
  if (dims.size() == 2) {
    x.array += queries - 1;
    x.head = dims[0] > 1 ? dims[1] : 0;
    x.query = -1;
    x.key = 1;
    return x;
  }
  x.row = dims[0] > 1 ? dims[1] * dims[2] * dims[3] : 0;
  x.head = dims[1] > 1 ? dims[2] * dims[3] : 0;
  x.query = dims[2] > 1 ? dims[3] : 0;
  x.key = dims[3] > 1 ? 1 : 0;
  return x;
}

// The operands and attributes that both directions have.
Call make_call(const std::vector<ffi::AnyBuffer>& operands, float scale,
               float logit_cap, double dropout_rate, int64_t dropout_stride,
               bool is_cache) {
  auto q = operands[0].dimensions(), k = operands[1].dimensions();
  Call call{};
  call.rows = q[0], call.queries = q[1], call.heads = q[2], call.key_size = q[3];
  call.groups = k[is_cache ? 1 : 2];
  call.keys = k[is_cache ? 3 : 1];
  call.value_size = operands[2].dimensions()[3];
  call.query = operands[0].untyped_data();
  call.key = operands[1].untyped_data();
  call.value = operands[2].untyped_data();
  call.is_cache = is_cache;
  call.bias = strided(optional<float>(operands[3]), operands[3].dimensions(),
                      optional<int32_t>(operands[4]), call.queries);
  call.mask = strided(optional<uint8_t>(operands[5]), operands[5].dimensions(),
                      optional<int32_t>(operands[6]), call.queries);
  call.ranges = optional<int32_t>(operands[7]);
  call.query_ids = optional<int32_t>(operands[8]);
  call.key_ids = optional<int32_t>(operands[9]);
  call.sinks = optional<float>(operands[10]);
  call.scale = scale, call.logit_cap = logit_cap;
  call.dropout.numbers = optional<uint32_t>(operands[11]);
  call.dropout.stride = dropout_stride;
  call.dropout.threshold = std::nearbyint(dropout_rate * 4294967295.0);
  call.dropout.factor = 1 / (1 - dropout_rate);
  return call;
}

ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs arguments,
                   ffi::Result<ffi::AnyBuffer> output,
                   ffi::Result<ffi::AnyBuffer> tops,
                   ffi::Result<ffi::AnyBuffer> log_totals, float scale,
                   float logit_cap, double dropout_rate, int64_t dropout_stride,
                   bool is_cache) {
  auto operands = buffers(arguments);
  Call call = make_call(operands, scale, logit_cap, dropout_rate,
                        dropout_stride, is_cache);
  const auto& kernel = kernels().of(operands[0].element_type() == ffi::F32);
  int64_t lines = call.shared() * call.queries;  // of one key head
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t parts = std::max<int64_t>(
      4 * threads / std::max<int64_t>(call.rows * call.groups, 1), 1);
  int64_t size = std::clamp((lines / parts + kQueries - 1) / kQueries * kQueries,
                            kQueries, kChunk);
  int64_t chunks = (lines + size - 1) / size;
  bool is_small = call.rows * lines * call.groups * call.keys < kSmall;
  for_each(pool, call.rows * call.groups * chunks, is_small, [&](int64_t i) {
    // From the last on, because causal queries at the end take longest.
    int64_t start = (chunks - 1 - i % chunks) * size, pair = i / chunks;
    kernel.forward(Chunk(call, pair / call.groups, pair % call.groups, start,
                     std::min(size, lines - start)),
                    output->untyped_data(),
                    static_cast<float*>(tops->untyped_data()),
                    static_cast<float*>(log_totals->untyped_data()));
  });
  return ffi::Error::Success();
}

// Zeroes the gradient of a key head.
void clear(const Call& call, int64_t row, int64_t group, int64_t size,
           float* gradient) {
  for (int64_t key = 0; key < call.keys; ++key)
    std::memset(
        gradient + ((row * call.keys + key) * call.groups + group) * size, 0,
        4 * size);
}

// The gradient of keys and values comes in one part for each of some splits of
// the queries, that of the bias in one for each share of the rows that read the
// same row of the bias. Each part is written by one task, in a fixed order.
ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs arguments,
                    ffi::Result<ffi::AnyBuffer> d_query,
                    ffi::Result<ffi::AnyBuffer> d_key,
                    ffi::Result<ffi::AnyBuffer> d_value,
                    ffi::Result<ffi::AnyBuffer> d_bias,
                    ffi::Result<ffi::AnyBuffer> deltas, float scale,
                    float logit_cap, double dropout_rate,
                    int64_t dropout_stride) {
  auto operands = buffers(arguments);
  Call call = make_call(operands, scale, logit_cap, dropout_rate,
                        dropout_stride, false);
  const auto &key = operands[1], &value = operands[2], &bias = operands[3];
  const auto& kernel = kernels().of(operands[0].element_type() == ffi::F32);
  int64_t splits = d_key->dimensions()[0];
  int64_t shares = 1, bias_size = 0, stored = call.rows;
  if (call.bias.array) {
    shares = d_bias->dimensions()[0];
    bias_size = bias.element_count();
    stored = bias.dimensions().size() == 2 ? 1 : bias.dimensions()[0];
    std::memset(d_bias->untyped_data(), 0, d_bias->size_bytes());
  }
  std::vector<std::vector<int64_t>> readers(stored);
  for (int64_t row = 0; row < call.rows; ++row)
    readers[stored == call.rows ? row : call.bias.rows[row]].push_back(row);
  // Heads that share a bias are one task's.
  int64_t head_tasks =
      call.bias.array && call.bias.head == 0 ? 1 : call.groups;
  int64_t lines = call.shared() * call.queries;
  int64_t split = (lines + splits - 1) / splits;
  bool is_small = call.rows * lines * call.groups * call.keys < kSmall;

  for_each(pool, stored * shares * head_tasks * splits, is_small, [&](int64_t i) {
    int64_t part = splits - 1 - i % splits;
    int64_t head_task = i / splits % head_tasks;
    int64_t share = i / splits / head_tasks % shares;
    const auto& rows = readers[i / splits / head_tasks / shares];
    Gradients gradients{};
    gradients.output = operands[12].untyped_data();
    gradients.d_output = operands[15].untyped_data();
    gradients.tops = optional<float>(operands[13]);
    gradients.log_totals = optional<float>(operands[14]);
    gradients.d_query = d_query->untyped_data();
    gradients.d_key = static_cast<float*>(d_key->untyped_data()) +
                      part * key.element_count();
    gradients.d_value = static_cast<float*>(d_value->untyped_data()) +
                        part * value.element_count();
    gradients.deltas = static_cast<float*>(deltas->untyped_data());
    if (call.bias.array)
      gradients.d_bias = strided(
          static_cast<float*>(d_bias->untyped_data()) + share * bias_size,
          bias.dimensions(), call.bias.rows, call.queries);
    int64_t per_share = (rows.size() + shares - 1) / shares;
    int64_t last = std::min<int64_t>((share + 1) * per_share, rows.size());
    int64_t groups = call.groups / head_tasks;
    for (int64_t n = share * per_share; n < last; ++n) {
      for (int64_t g = head_task * groups; g < (head_task + 1) * groups; ++g) {
        clear(call, rows[n], g, call.key_size, gradients.d_key);
        clear(call, rows[n], g, call.value_size, gradients.d_value);
        int64_t stop = std::min((part + 1) * split, lines);
        for (int64_t start = part * split; start < stop; start += kChunk)
          kernel.backward(
              Chunk(call, rows[n], g, start, std::min(kChunk, stop - start)),
              gradients);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("logit_cap")
                                  .Attr<double>("dropout_rate")
                                  .Attr<int64_t>("dropout_stride")
                                  .Attr<bool>("is_cache"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("logit_cap")
                                  .Attr<double>("dropout_rate")
                                  .Attr<int64_t>("dropout_stride"));
