// How a kernel is called: `splat_run` from anywhere, and `splat_ffi` from XLA, whose call frame becomes a `Call`.
//
//   kernel        operands                                                                  results
//   forward       query, key, value, [kv_lengths], [where, arrays], tables                  out, lse
//   decode        the same                                                                  out, lse
//   d_query       query, key, value, out, lse, d_out, d_lse, [...] as above, tables         d_query
//   d_key_value   the same                                                                  d_key, d_value
//   backward      those of d_query                                                          d_query, d_key, d_value
//
// Arrays are [batch, position, head, head_dim] of the kernel's type, row-major; lse and d_lse [batch, position, head]
// of its compute type; kv_lengths int32 [batch]; where and arrays, for score_mod, and tables as call.hpp says.
// Attributes: scale and soft_cap, float64.
#pragma once
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "splat/call.hpp"
#include "splat/threads.hpp"
#include "splat/walk.hpp"

#define SPLAT_VISIBLE extern "C" __attribute__((visibility("default")))

/// The library's two entries, for splat::kernel<facts, passes...>(const Call&, Pool&).
#define SPLAT_KERNEL(kernel, ...)                                                        \
  SPLAT_VISIBLE int splat_run(const splat::Call* call, int num_threads, splat::Team team) { \
    splat::Pool pool = splat::own_threads(num_threads, team);                            \
    splat::kernel<__VA_ARGS__>(*call, pool);                                             \
    return 0;                                                                            \
  }                                                                                      \
  SPLAT_XLA_HANDLER(kernel, __VA_ARGS__)

#if !__has_include("xla/ffi/api/c_api.h")
#define SPLAT_XLA_HANDLER(kernel, ...)
#else
#include "xla/ffi/api/c_api.h"

#define SPLAT_XLA_HANDLER(kernel, ...)                                                              \
  SPLAT_VISIBLE XLA_FFI_Error* splat_ffi(XLA_FFI_CallFrame* frame) {                                \
    return splat::xla::Handler<splat::xla::Kind::kernel, __VA_ARGS__>::handle(                      \
        frame, splat::kernel<__VA_ARGS__>);                                                         \
  }

namespace splat::xla {

enum class Kind { forward, decode, d_query, d_key_value, backward };

template <class T> constexpr XLA_FFI_DataType kType = XLA_FFI_DataType_S32;
template <> constexpr XLA_FFI_DataType kType<float> = XLA_FFI_DataType_F32;
template <> constexpr XLA_FFI_DataType kType<double> = XLA_FFI_DataType_F64;
template <> constexpr XLA_FFI_DataType kType<bfloat16> = XLA_FFI_DataType_BF16;
template <> constexpr XLA_FFI_DataType kType<float16> = XLA_FFI_DataType_F16;

/// Whether there is no error; one that there is ends here.
inline bool succeeded(XLA_FFI_CallFrame* frame, XLA_FFI_Error* error) {
  if (!error) return true;
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  frame->api->XLA_FFI_Error_Destroy(&args);
  return false;
}

/// Whether the frame only asked for the version that this was made for, and has its answer.
inline bool answered(XLA_FFI_CallFrame* frame) {
  for (auto* one = frame->extension_start; one; one = one->next) {
    if (one->type != XLA_FFI_Extension_Metadata) continue;
    auto* metadata = ((XLA_FFI_Metadata_Extension*)one)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    return true;
  }
  return false;
}

/// XLA's threads; for as long as the call.
inline Pool threads_of(XLA_FFI_CallFrame* frame) {
  int64_t num_threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame->ctx, &num_threads};
  if (!succeeded(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&args))) num_threads = 1;
  auto schedule = [](void* context, void (*task)(void*), void* data) {
    auto* frame = (XLA_FFI_CallFrame*)context;
    XLA_FFI_ThreadPool_Schedule_Args args = {
        XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, frame->ctx, task, data};
    return succeeded(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&args));
  };
  return {(int)num_threads, schedule, frame, nullptr};
}

/// Results are in memory that nobody has touched, often: it comes in fewer, larger pages, where the system has some.
inline void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 2 << 20;
  const int64_t begin = ((int64_t)data + kPage - 1) / kPage * kPage, end = ((int64_t)data + bytes) / kPage * kPage;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // only advice: what it returns does not matter
#endif
}

/// Reads a call frame; what does not fit ends up in `message`.
class Reader {
 public:
  explicit Reader(XLA_FFI_CallFrame* frame) : frame_(frame) {}

  bool good() const { return !message_[0]; }
  int64_t num_operands() const { return frame_->args.size; }

  XLA_FFI_Error* error() const {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message_,
                                      XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame_->api->XLA_FFI_Error_Create(&args);
  }

  template <class... Values> void complain(const char* format, Values... values) {
    if (good()) snprintf(message_, sizeof message_, format, values...);
  }

  void check_counts(int64_t operands, int64_t results) {
    if (frame_->args.size != operands && frame_->args.size != operands + 1)
      complain("splat: %lld operands, or one more with kv_lengths, but there are %lld", (long long)operands,
               (long long)frame_->args.size);
    if (frame_->rets.size != results)
      complain("splat: %lld results, but there are %lld", (long long)results, (long long)frame_->rets.size);
  }

  /// The next operand, of these sizes; a size of -1 is read, and others are compared with it.
  template <class T, class... Sizes> T* operand(const char* name, Sizes&... sizes) {
    if (!good()) return nullptr;
    if (frame_->args.types[at_] != XLA_FFI_ArgType_BUFFER) complain("splat: %s is no array", name);
    return array<T>(name, (XLA_FFI_Buffer*)frame_->args.args[at_++], sizes...);
  }

  /// The next operand, whatever it is.
  const void* operand_of_any_kind(const char* name) {
    if (!good()) return nullptr;
    if (frame_->args.types[at_] != XLA_FFI_ArgType_BUFFER) complain("splat: %s is no array", name);
    return ((XLA_FFI_Buffer*)frame_->args.args[at_++])->data;
  }

  template <class T, class... Sizes> T* result(const char* name, Sizes&... sizes) {
    if (!good()) return nullptr;
    T* const data = array<T>(name, (XLA_FFI_Buffer*)frame_->rets.rets[result_++], sizes...);
    if (good()) advise_large_pages(data, sizeof(T) * (sizes * ...));
    return data;
  }

  double attribute(const char* name) {
    for (int64_t n = 0; n < frame_->attrs.size; ++n) {
      const XLA_FFI_ByteSpan& given = *frame_->attrs.names[n];
      if (given.len != strlen(name) || strncmp(given.ptr, name, given.len)) continue;
      auto* scalar = (XLA_FFI_Scalar*)frame_->attrs.attrs[n];
      if (frame_->attrs.types[n] == XLA_FFI_AttrType_SCALAR && scalar->dtype == XLA_FFI_DataType_F64)
        return *(double*)scalar->value;
    }
    complain("splat: the attribute %s must be a float64", name);
    return 0;
  }

 private:
  template <class T, class... Sizes> T* array(const char* name, XLA_FFI_Buffer* buffer, Sizes&... sizes) {
    int64_t* const expected[] = {&sizes...};
    if (buffer->dtype != kType<T>) complain("splat: %s has type %d, not %d", name, (int)buffer->dtype, (int)kType<T>);
    if (buffer->rank != (int64_t)sizeof...(sizes))
      complain("splat: %s has %d axes, not %d", name, (int)buffer->rank, (int)sizeof...(sizes));
    for (int64_t n = 0; good() && n < buffer->rank; ++n) {
      if (*expected[n] < 0) *expected[n] = buffer->dims[n];
      if (*expected[n] != buffer->dims[n])
        complain("splat: axis %d of %s has length %lld, not %lld", (int)n, name, (long long)buffer->dims[n],
                 (long long)*expected[n]);
    }
    return (T*)buffer->data;
  }

  XLA_FFI_CallFrame* frame_;
  int64_t at_ = 0, result_ = 0;
  char message_[200] = {};
};

/// A row-major array [batch, position, head, width].
inline Array dense(const void* data, int64_t positions, int64_t heads, int64_t width) {
  return {(void*)data, positions * heads * width, heads * width, width};
}

template <Kind kKind, class Facts, class... Passes> class Handler {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  static constexpr int kTables = kKind == Kind::decode ? 1 : (0 + ... + Passes::kTables);
  static constexpr bool kForward = kKind == Kind::forward || kKind == Kind::decode;
  static constexpr int num_arrays() {
    if constexpr (Facts::modified) return Facts::Mod::num_arrays;
    else return 0;
  }
  static constexpr int kArrays = (kForward ? 3 : 7) + (Facts::modified ? 1 + num_arrays() : 0);
  static constexpr bool kQueries = kKind == Kind::d_query || kKind == Kind::backward;    // results: d_query
  static constexpr bool kKeys = kKind == Kind::d_key_value || kKind == Kind::backward;   // d_key and d_value
  static constexpr int kResults = kForward ? 2 : kQueries + 2 * kKeys;

 public:
  static XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame, void (*run)(const Call&, Pool&)) {
    if (answered(frame)) return nullptr;
    Reader reader(frame);
    Call call = {};
    const int32_t* tables[kTables];
    int64_t num_groups[sizeof...(Passes) + 2];
    const void* arrays[num_arrays() + 1];
    call.tables = tables;
    call.num_groups = num_groups;
    call.arrays = arrays;
    read(reader, call, tables, num_groups, arrays);
    if (!reader.good()) return reader.error();
    Pool pool = threads_of(frame);
    run(call, pool);
    return nullptr;
  }

 private:
  static void read(Reader& reader, Call& call, const int32_t** tables, int64_t* num_groups, const void** arrays) {
    reader.check_counts(kArrays + kTables, kResults);
    int64_t batch = -1, queries = -1, keys = -1, heads = -1, shared = -1, width = Facts::head_dim;
    auto query = [&](const void* data) { return dense(data, queries, heads, width); };
    auto key = [&](const void* data) { return dense(data, keys, shared, width); };
    auto row = [&](const void* data) { return dense(data, queries, heads, 1); };
    call.query = query(reader.operand<Scalar>("query", batch, queries, heads, width));  // sizes are read first
    call.key = key(reader.operand<Scalar>("key", batch, keys, shared, width));
    call.value = key(reader.operand<Scalar>("value", batch, keys, shared, width));
    if (reader.good() && (shared < 1 || heads % shared))
      reader.complain("splat: %d query heads cannot share %d key heads", (int)heads, (int)shared);
    if (!kForward) {
      call.out = query(reader.operand<Scalar>("out", batch, queries, heads, width));
      call.lse = row(reader.operand<T>("lse", batch, queries, heads));
      call.d_out = query(reader.operand<Scalar>("d_out", batch, queries, heads, width));
      call.d_lse = row(reader.operand<T>("d_lse", batch, queries, heads));
    }
    if (reader.num_operands() > kArrays + kTables) call.kv_lengths = reader.operand<int32_t>("kv_lengths", batch);
    if constexpr (Facts::modified) {
      int64_t numbers = 3;
      call.where = reader.operand<int32_t>("where", batch, heads, numbers);
      for (int n = 0; n < num_arrays(); ++n) arrays[n] = reader.operand_of_any_kind("an array of score_mod");
    }
    int64_t rows = kKind == Kind::d_key_value ? keys : queries;
    if (kKind == Kind::decode) {
      int64_t numbers = -1;
      *tables = reader.operand<int32_t>("RUNS", batch, rows, numbers);
      num_groups[0] = numbers / 3, num_groups[1] = rows;
    }
    ((read_pass<Passes>(reader, rows, tables, num_groups), tables += Passes::kTables, ++num_groups), ...);
    if (kForward) {
      call.out = query(reader.result<Scalar>("out", batch, queries, heads, width));
      call.lse = row(reader.result<T>("lse", batch, queries, heads));
    }
    if (kQueries) call.d_query = query(reader.result<Scalar>("d_query", batch, queries, heads, width));
    if (kKeys) {
      call.d_key = key(reader.result<Scalar>("d_key", batch, keys, shared, width));
      call.d_value = key(reader.result<Scalar>("d_value", batch, keys, shared, width));
    }
    call.scale = reader.attribute("scale");
    call.soft_cap = reader.attribute("soft_cap");
    call.batch = batch, call.q_len = queries, call.kv_len = keys;
    call.num_q_heads = heads, call.num_kv_heads = shared;
  }

  template <class One>
  static void read_pass(Reader& reader, int64_t rows, const int32_t** tables, int64_t* num_groups) {
    int64_t walks = One::kWalks, fields = 5, bounds = One::kBounds, sides = 2, lanes = 16;
    *num_groups = One::kStep ? One::residues(rows) * One::groups_of_residue(rows) : -1;
    *tables++ = reader.operand<int32_t>("GROUPS", *num_groups, walks, fields);
    if (One::kBounds) *tables++ = reader.operand<int32_t>("BOUNDS", bounds, sides, rows);
    if (!One::kStep) *tables++ = reader.operand<int32_t>("ROWS", *num_groups, lanes);
  }
};

}  // namespace splat::xla
#endif
