// What generated score modifications are spelled with: numbers that are the same for all lanes, and vectors of them.
//
// A program of scalars becomes one for a vector of scores: what depends on the query or on the key, whichever lies in
// the lanes, is a vector, and everything else a number. Each function takes both, in any mixture. Integers are as wide
// as the compute type T; a condition is a bool, or a vector of 0 and -1.
#pragma once
#include "splat/call.hpp"
#include "splat/vector.hpp"

namespace splat::mod {

template <class X> constexpr bool kNumber = false;
template <> inline constexpr bool kNumber<bool> = true;
template <> inline constexpr bool kNumber<float> = true;
template <> inline constexpr bool kNumber<double> = true;
template <> inline constexpr bool kNumber<int32_t> = true;
template <> inline constexpr bool kNumber<int64_t> = true;

/// A vector, of a number too.
template <class T, class X> SPLAT_INLINE Vec<T> real_vector(X x) {
  if constexpr (kNumber<X>) return splat_of((T)x);
  else return x;
}
template <class T, class X> SPLAT_INLINE Vec<Int<T>> whole_vector(X x) {
  if constexpr (__is_same(X, bool)) return splat_of((Int<T>)-x);
  else if constexpr (kNumber<X>) return splat_of((Int<T>)x);
  else return x;
}

// -- conditions --------------------------------------------------------------------------------------------------------

template <class T, class A, class B> SPLAT_INLINE auto both(A a, B b) {
  if constexpr (kNumber<A> && kNumber<B>) return a && b;
  else return whole_vector<T>(a) & whole_vector<T>(b);
}
template <class T, class A, class B> SPLAT_INLINE auto either(A a, B b) {
  if constexpr (kNumber<A> && kNumber<B>) return a || b;
  else return whole_vector<T>(a) | whole_vector<T>(b);
}
template <class T, class A> SPLAT_INLINE auto negated(A a) {
  if constexpr (kNumber<A>) return !a;
  else return ~a;
}
template <class T, class A, class B> SPLAT_INLINE auto different(A a, B b) {
  if constexpr (kNumber<A> && kNumber<B>) return a != b;
  else return whole_vector<T>(a) ^ whole_vector<T>(b);
}

/// a where the condition holds, else b.
template <class T, class C, class A, class B> SPLAT_INLINE auto choose_real(C condition, A a, B b) {
  if constexpr (kNumber<C> && kNumber<A> && kNumber<B>) return condition ? (T)a : (T)b;
  else return whole_vector<T>(condition) ? real_vector<T>(a) : real_vector<T>(b);
}
template <class T, class C, class A, class B> SPLAT_INLINE auto choose_whole(C condition, A a, B b) {
  if constexpr (kNumber<C> && kNumber<A> && kNumber<B>) return condition ? (Int<T>)a : (Int<T>)b;
  else return whole_vector<T>(condition) ? whole_vector<T>(a) : whole_vector<T>(b);
}
template <class T, class C, class A, class B> SPLAT_INLINE auto choose_condition(C condition, A a, B b) {
  return either<T>(both<T>(condition, a), both<T>(negated<T>(condition), b));
}

// -- integers ----------------------------------------------------------------------------------------------------------

template <class T, class A, class B> SPLAT_INLINE auto least_whole(A a, B b) { return choose_whole<T>(a < b, a, b); }
template <class T, class A, class B> SPLAT_INLINE auto most_whole(A a, B b) { return choose_whole<T>(a > b, a, b); }
template <class T, class A, class B, class C> SPLAT_INLINE auto clamp_whole(A low, B x, C high) {
  return least_whole<T>(most_whole<T>(x, low), high);
}
template <class T, class A> SPLAT_INLINE auto sign_whole(A a) {
  return choose_whole<T>(a > 0, (Int<T>)1, choose_whole<T>(a < 0, (Int<T>)-1, (Int<T>)0));
}
// Sums that come around.
template <class T> struct UnsignedOf { using type = uint32_t; };
template <> struct UnsignedOf<double> { using type = uint64_t; };
template <class T, class A, class B, class F> SPLAT_INLINE Vec<Int<T>> unsigned_vector(A a, B b, F&& f) {
  using U = Vec<typename UnsignedOf<T>::type>;
  return bits_as<Vec<Int<T>>>(f(bits_as<U>(whole_vector<T>(a)), bits_as<U>(whole_vector<T>(b))));
}
template <class T, class A, class B> SPLAT_INLINE auto plus(A a, B b) {
  if constexpr (kNumber<A> && kNumber<B>) return (Int<T>)((uint64_t)a + (uint64_t)b);
  else return unsigned_vector<T>(a, b, [](auto a, auto b) SPLAT_INLINED { return a + b; });
}
template <class T, class A, class B> SPLAT_INLINE auto minus(A a, B b) {
  if constexpr (kNumber<A> && kNumber<B>) return (Int<T>)((uint64_t)a - (uint64_t)b);
  else return unsigned_vector<T>(a, b, [](auto a, auto b) SPLAT_INLINED { return a - b; });
}
template <class T, class A, class B> SPLAT_INLINE auto times(A a, B b) {
  if constexpr (kNumber<A> && kNumber<B>) return (Int<T>)((uint64_t)a * (uint64_t)b);
  else return unsigned_vector<T>(a, b, [](auto a, auto b) SPLAT_INLINED { return a * b; });
}

/// By as many bits as the type has, or by less than none, nothing is left.
template <class T, int bits, class A, class B> SPLAT_INLINE auto shift_left(A a, B by) {
  const auto inside = both<T>(by >= 0, by < bits);
  const auto safe = choose_whole<T>(inside, by, (Int<T>)0);
  if constexpr (kNumber<A> && kNumber<B>) return inside ? (Int<T>)((uint64_t)a << safe) : (Int<T>)0;
  else return choose_whole<T>(inside, whole_vector<T>(a) << whole_vector<T>(safe), (Int<T>)0);
}
/// ... but the sign.
template <class T, int bits, class A, class B> SPLAT_INLINE auto shift_right(A a, B by) {
  const auto safe = choose_whole<T>(both<T>(by >= 0, by < bits), by, (Int<T>)(bits - 1));
  if constexpr (kNumber<A> && kNumber<B>) return (Int<T>)(a >> safe);
  else return whole_vector<T>(a) >> whole_vector<T>(safe);
}

/// Rounded towards 0; by 0 it is -1, as XLA has it. No processor is asked what it cannot divide.
template <class T, class A, class B> SPLAT_INLINE auto quotient(A a, B b) {
  const auto divisor = choose_whole<T>(either<T>(b == 0, b == -1), (Int<T>)1, b);
  return choose_whole<T>(b == 0, (Int<T>)-1, choose_whole<T>(b == -1, minus<T>((Int<T>)0, a), a / divisor));
}
template <class T, class A, class B> SPLAT_INLINE auto remainder(A a, B b) {
  const auto divisor = choose_whole<T>(either<T>(b == 0, b == -1), (Int<T>)1, b);
  return choose_whole<T>(b == 0, a, a % divisor);
}
/// The nearest number of the type, 0 for NaN, as XLA has it.
template <class T, class To, class A> SPLAT_INLINE auto to_whole(A a) {
  constexpr To least = (To)-1 > 0 ? (To)0 : (To)((uint64_t)1 << (8 * sizeof(To) - 1)), most = (To)~least;
  const auto inside = both<T>(a > (T)least, a < (T)most);
  const auto safe = choose_real<T>(inside, a, (T)0);
  const auto below = choose_whole<T>(a <= (T)least, (Int<T>)least, (Int<T>)0);  // 0: NaN
  const auto edge = choose_whole<T>(a >= (T)most, (Int<T>)most, below);
  if constexpr (kNumber<A>) return choose_whole<T>(inside, (Int<T>)safe, edge);
  else return choose_whole<T>(inside, converted<Vec<Int<T>>>(safe), edge);
}

/// The number of a narrower type that an integer stands for.
template <class T, class Narrow, class A> SPLAT_INLINE auto wrapped(A a) {
  if constexpr (kNumber<A>) return (Int<T>)(Narrow)a;
  else if constexpr ((Narrow)-1 > 0) return a & (Int<T>)(Narrow)-1;
  else {
    constexpr int more = 8 * (sizeof(Int<T>) - sizeof(Narrow));
    return a << more >> more;
  }
}

// -- real numbers ------------------------------------------------------------------------------------------------------

template <class T, class A> SPLAT_INLINE auto to_real(A a) {
  if constexpr (kNumber<A>) return (T)a;
  else return converted<Vec<T>>(a);
}
/// NaN where one of them is.
template <class T, class A, class B> SPLAT_INLINE auto least_real(A a, B b) {
  return choose_real<T>(either<T>(a < b, a != a), a, b);
}
template <class T, class A, class B> SPLAT_INLINE auto most_real(A a, B b) {
  return choose_real<T>(either<T>(a > b, a != a), a, b);
}
template <class T, class A, class B, class C> SPLAT_INLINE auto clamp_real(A low, B x, C high) {
  return least_real<T>(most_real<T>(x, low), high);
}
template <class T, class A> SPLAT_INLINE auto absolute(A a) { return choose_real<T>(a <= (T)0, (T)0 - a, a); }
template <class T, class A> SPLAT_INLINE auto sign_real(A a) {
  return choose_real<T>(a > (T)0, (T)1, choose_real<T>(a < (T)0, (T)-1, a));
}

/// f of a number, or of each lane.
template <class T, class A, class F> SPLAT_INLINE auto each(A a, F&& f) {
  if constexpr (kNumber<A>) {
    return (T)f((T)a);
  } else {
    for (int n = 0; n < kWidth<T>; ++n) a[n] = (T)f(a[n]);
    return a;
  }
}
template <class T, class A, class B, class F> SPLAT_INLINE auto each(A a, B b, F&& f) {
  if constexpr (kNumber<A> && kNumber<B>) {
    return (T)f((T)a, (T)b);
  } else {
    Vec<T> x = real_vector<T>(a);
    const Vec<T> y = real_vector<T>(b);
    for (int n = 0; n < kWidth<T>; ++n) x[n] = (T)f(x[n], y[n]);
    return x;
  }
}

/// A function of vectors, of a number or a vector.
template <class T, class A, class F> SPLAT_INLINE auto of_vector(A a, F&& f) {
  if constexpr (kNumber<A>) return f(splat_of((T)a))[0];
  else return f(a);
}
template <class T, class A> SPLAT_INLINE auto exp2_real(A a) {
  return of_vector<T>(a, [](Vec<T> x) SPLAT_INLINED {
    constexpr T most = sizeof(T) == 4 ? (T)128 : (T)1024;
    constexpr T last = sizeof(T) == 4 ? (T)0x1.fffffep6 : (T)0x1.fffffffffffffp9;
    const Vec<T> power = exp2<T>(smaller<T>(splat_of(last), x));
    return x < most ? power : x == x ? splat_of(kInfinity<T>) : x;
  });
}
template <class T, class A> SPLAT_INLINE auto exp_real(A a) {
  if constexpr (sizeof(T) == 8) return each<T>(a, [](T x) { return __builtin_exp(x); });
  else  // in two steps: a rounding of x * log2(e) would count as often as x is large
    return of_vector<T>(a, [](Vec<T> x) SPLAT_INLINED {
      const Vec<T> inside = smaller<T>(splat_of((T)100), larger<T>(splat_of((T)-110), x));
      const Vec<T> high = smaller<T>(splat_of((T)127), to_real<T>(converted<Vec<Int<T>>>(inside * kLog2e<T>)));
      const Vec<T> low = (inside - high * (T)0.693359375) + high * (T)2.12194440e-4;  // x - high * log(2)
      return x == x ? exp2<T>(high) * exp2<T>(low * kLog2e<T>) : x;
    });
}
template <class T, class A> SPLAT_INLINE auto log_real(A a) {
  if constexpr (sizeof(T) == 8) return each<T>(a, [](T x) { return __builtin_log(x); });
  else
    return of_vector<T>(a, [](Vec<T> x) SPLAT_INLINED {
      const Vec<T> natural = log2<T>(x) * kLn2<T>, nan = splat_of((T)__builtin_nan(""));
      const Vec<T> inside = x < kInfinity<T> ? natural : x;
      return x >= (T)1.1754944e-38f ? inside : x >= (T)0 ? splat_of(-kInfinity<T>) : nan;
    });
}
template <class T, class A> SPLAT_INLINE auto tanh_real(A a) {
  return of_vector<T>(a, [](Vec<T> x) SPLAT_INLINED { return x == x ? splat::tanh<T>(x) : x; });
}
template <class T, class A> SPLAT_INLINE auto logistic(A a) { return (T)1 / ((T)1 + exp_real<T>(-a)); }
template <class T, class A> SPLAT_INLINE auto root(A a) {
  return each<T>(a, [](T x) { return sizeof(T) == 4 ? (T)__builtin_sqrtf(x) : (T)__builtin_sqrt(x); });
}
/// a^n for a positive n that is known.
template <class T, int n, class A> SPLAT_INLINE auto power_real(A a) {
  if constexpr (n == 1) return a;
  else if constexpr (n % 2) return a * power_real<T, n - 1>(a);
  else return power_real<T, n / 2>(a * a);
}
template <class T, int n, class A> SPLAT_INLINE auto power_whole(A a) {
  if constexpr (n == 1) return a;
  else if constexpr (n % 2) return times<T>(a, power_whole<T, n - 1>(a));
  else return power_whole<T, n / 2>(times<T>(a, a));
}

// -- elements of arrays ------------------------------------------------------------------------------------------------

/// Along one axis: an index, and how many elements lie between one and the next.
template <class X> struct Along {
  X index;
  int64_t step;
  SPLAT_INLINE int64_t place(int lane) const {
    if constexpr (kNumber<X>) return index * step;
    else return index[lane] * step;
  }
};
template <class X> SPLAT_INLINE Along<X> along(X index, int64_t step) { return {index, step}; }

/// The element at some indices, as a number of type Of.
template <class Of, class From, class... X> SPLAT_INLINE auto element(const From* from, Along<X>... along) {
  auto number = [](From x) SPLAT_INLINED {
    if constexpr (__is_same(From, bfloat16) || __is_same(From, float16)) return (Of)to_compute(x);
    else return (Of)x;
  };
  if constexpr ((kNumber<X> && ...)) {
    return number(from[(int64_t{} + ... + along.place(0))]);
  } else {
    Vec<Of> out;
    for (int n = 0; n < kWidth<Of>; ++n) out[n] = number(from[(int64_t{} + ... + along.place(n))]);
    return out;
  }
}

// -- what a modification takes and gives -------------------------------------------------------------------------------

/// Which scores: one of row and column is a number, the other one a vector. The row is a query's index; `offset + row`
/// is its position.
template <class T, class Row, class Column> struct At {
  const void* const* arrays;  // that it closes over
  Int<T> batch, head, offset;
  Row row;
  Column column;
};

template <class Value, class Slope> struct Pair {
  Value value;
  Slope slope;
};
template <class Value, class Slope> SPLAT_INLINE Pair<Value, Slope> pair(Value value, Slope slope) {
  return {value, slope};
}

}  // namespace splat::mod
