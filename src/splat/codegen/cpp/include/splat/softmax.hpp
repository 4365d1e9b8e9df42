// R-softmax: each row's exponentials over their sum, over all components.
#pragma once
#include "splat/values.hpp"

namespace splat {

template <class Facts> struct Softmax {
  using T = typename Facts::Scalar;
  static constexpr int W = kWidth<T>, kUnit = 32;

  /// Calls body(vector, where, number of its lanes that count) for the values of a row; others are -infinity.
  template <class Body> static SPLAT_INLINE void over(const ValuesCall& call, int64_t row, const T* from, Body&& body) {
    for (int64_t n = 0; n < call.num_components; ++n) {
      const Component& c = call.components[n];
      const int64_t count = c.count[row];
      for (int64_t t = 0; t < count; t += W) {
        const int64_t left = count - t;
        if (left >= W) {
          body(load(from + c.place[row] + t), c.place[row] + t, W);
        } else {
          Vec<T> some = splat_of(-kInfinity<T>);
          memcpy(&some, from + c.place[row] + t, left * sizeof(T));
          body(some, c.place[row] + t, (int)left);
        }
      }
    }
  }

  static void row(const ValuesCall& call, int64_t batch, int64_t row) {
    const T* const from = (const T*)call.values + batch * call.size;
    T* const to = (T*)call.result + batch * call.size;
    Vec<T> most = splat_of(-kInfinity<T>), sums = {};
    over(call, row, from, [&](Vec<T> v, int64_t, int) { most = larger<T>(v, most); });
    T top = most[0], sum = 0;
    for (int n = 1; n < W; ++n) top = top > most[n] ? top : most[n];
    const T base = top == -kInfinity<T> ? 0 : top;
    over(call, row, from, [&](Vec<T> v, int64_t at, int count) {
      const Vec<T> weight = exp2<T>((v - base) * kLog2e<T>);
      sums += weight;
      memcpy(to + at, &weight, count * sizeof(T));
    });
    for (int n = 0; n < W; ++n) sum += sums[n];
    const T factor = sum == 0 ? 0 : 1 / sum;
    for (int64_t n = 0; n < call.num_components; ++n) {
      const Component& c = call.components[n];
      T* const own = to + c.place[row];
      const int64_t count = c.count[row], whole = count / W * W;
      for (int64_t t = 0; t < whole; t += W) store(own + t, load(own + t) * factor);
      for (int64_t t = whole; t < count; ++t) own[t] *= factor;
      pad(c, row, to);
    }
  }
};

template <class Facts> void softmax(const ValuesCall& call, Pool& pool) {
  using Kernel = Softmax<Facts>;
  const int64_t units = ceil_div(call.rows, Kernel::kUnit);
  parallel_for(pool, units * call.batch, [&](int64_t index) {
    const int64_t from = index % units * Kernel::kUnit;
    for (int64_t row = from; row < from + Kernel::kUnit && row < call.rows; ++row)
      Kernel::row(call, index / units, row);
  });
}

}  // namespace splat
