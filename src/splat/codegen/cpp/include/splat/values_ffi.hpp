// How XLA calls an operation on values: its call frame becomes a `ValuesCall`.
//
//   kernel            operands                               result
//   sddmm             left, right, META, tables              values
//   softmax           values, META, tables                   values
//   spmm              values, right, META, tables            [batch, rows, head_dim]
//   spmm_transposed   values, left, META, tables             [batch, columns, head_dim]
//
// Values are [batch, size]. META is int32 [components, 2]: stride, hop. Tables are int32, seven for each component:
// START, COUNT, ORDER, PLACE, BEFORE and AFTER [rows], OFFSETS [groups + 1]. Attribute: savings, a float64 whose bits 0
// and 1 are those of `Savings`.
#pragma once
#include "splat/ffi.hpp"
#include "splat/softmax.hpp"

#if !__has_include("xla/ffi/api/c_api.h")
#define SPLAT_VALUES_KERNEL(kernel, Facts)
#else
#define SPLAT_VALUES_KERNEL(kernel, Facts)                                                                        \
  SPLAT_VISIBLE XLA_FFI_Error* splat_ffi(XLA_FFI_CallFrame* frame) {                                              \
    return splat::xla::ValuesHandler<splat::xla::ValuesKind::kernel, Facts>::handle(frame, splat::kernel<Facts>); \
  }

namespace splat::xla {

enum class ValuesKind { sddmm, softmax, spmm, spmm_transposed };

template <ValuesKind kKind, class Facts> class ValuesHandler {
  using Scalar = typename Facts::Scalar;
  using Result = typename Facts::Result;
  using T = Compute<Scalar>;
  static constexpr int kMost = 256;  // components; values.py knows it too

 public:
  static XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame, void (*run)(const ValuesCall&, Pool&)) {
    if (answered(frame)) return nullptr;
    Reader reader(frame);
    ValuesCall call = {};
    Component components[kMost];
    call.components = components;
    read(reader, call, components);
    if (!reader.good()) return reader.error();
    Pool pool = threads_of(frame);
    run(call, pool);
    return nullptr;
  }

 private:
  static void read(Reader& reader, ValuesCall& call, Component* components) {
    int64_t batch = -1, rows = -1, columns = -1, size = -1, number = -1, fields = 2, width = Facts::head_dim;
    if (kKind == ValuesKind::sddmm) call.left = reader.operand<Scalar>("left", batch, rows, width);
    else call.values = reader.operand<T>("values", batch, size);
    if (kKind == ValuesKind::sddmm || kKind == ValuesKind::spmm)
      call.right = reader.operand<Scalar>("right", batch, columns, width);
    if (kKind == ValuesKind::spmm_transposed) call.left = reader.operand<Scalar>("left", batch, rows, width);
    const int32_t* meta = reader.operand<int32_t>("META", number, fields);
    if (reader.good() && number > kMost) reader.complain("splat: %d components are too many", (int)number);
    for (int64_t n = 0; reader.good() && n < number; ++n, meta += fields) {
      int64_t offsets = -1;
      Component& one = components[n];
      one.stride = meta[0], one.hop = meta[1];
      one.start = reader.operand<int32_t>("START", rows);
      one.count = reader.operand<int32_t>("COUNT", rows);
      one.order = reader.operand<int32_t>("ORDER", rows);
      one.place = reader.operand<int32_t>("PLACE", rows);
      one.before = reader.operand<int32_t>("BEFORE", rows);
      one.after = reader.operand<int32_t>("AFTER", rows);
      one.offsets = reader.operand<int32_t>("OFFSETS", offsets);
      one.groups = offsets - 1;
    }
    if (kKind == ValuesKind::sddmm || kKind == ValuesKind::softmax)
      call.result = reader.result<Result>("values", batch, size);
    if (kKind == ValuesKind::spmm) call.result = reader.result<Result>("result", batch, rows, width);
    if (kKind == ValuesKind::spmm_transposed) call.result = reader.result<Result>("result", batch, columns, width);
    const int savings = (int)reader.attribute("savings");
    call.savings = {(savings & 1) != 0, (savings & 2) != 0};
    call.batch = batch, call.rows = rows, call.columns = columns, call.size = size, call.num_components = number;
  }
};

}  // namespace splat::xla
#endif
