// Vectors of the compiler's own kind, as wide as the processor's, and the storage types that convert to them.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define SPLAT_INLINED __attribute__((always_inline))  // of a lambda
#define SPLAT_INLINE inline SPLAT_INLINED
#define SPLAT_UNROLL _Pragma("GCC unroll 32")
#define SPLAT_UNROLL2 _Pragma("GCC unroll 2")
#define SPLAT_UNROLL_STEPS _Pragma("GCC unroll 128")  // of matrix tiles, up to a head dim of 512

namespace splat {

#if defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__) || defined(__znver6__)
#define SPLAT_ZEN 1  // AMD's processors; compilers may know them by an older one's name
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SPLAT_AVX512 1
#if defined(__AVX512BF16__) && (defined(__AMX_BF16__) || defined(__AMXBF16__))  // as clang spelled it before 15
#define SPLAT_AMX 1
#endif
#if defined(__AVX512BF16__) && !defined(SPLAT_AMX) && defined(SPLAT_ZEN) && !defined(SPLAT_PAIRS)
#define SPLAT_PAIRS 1  // products of bfloat16 pairs have twice the rate of float's; on Intel's processors half of it
#endif
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

#if defined(SPLAT_AVX512) || (defined(__AVX2__) && defined(__F16C__))
#define SPLAT_F16C 1
#endif

/// A number that functions are specialised for.
template <int N> struct Constant {
  constexpr operator int() const { return N; }
};

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T> struct IntOf { using type = int32_t; };
template <> struct IntOf<double> { using type = int64_t; };
/// The integer that is as wide as T: what comparisons of T give.
template <class T> using Int = typename IntOf<T>::type;

template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
/// What a storage type is computed in.
template <class Scalar> using Compute = typename ComputeOf<Scalar>::type;

template <class T> struct VectorOf { typedef T type __attribute__((vector_size(kVectorBytes))); };
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> constexpr int kWidth = kVectorBytes / (int)sizeof(T);

template <class T> SPLAT_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class T> SPLAT_INLINE void store(T* to, Vec<T> v) { memcpy(to, &v, sizeof v); }
#ifdef SPLAT_AVX512
/// A vector to where a line of memory begins, past all caches: the line is not read first, as it is for `store`.
template <class T> SPLAT_INLINE void store_past_caches(T* to, Vec<T> v) {
  asm("vmovntps %1, %0" : "=m"(*(char(*)[64])to) : "v"(v));
}
#endif
template <class T> SPLAT_INLINE Vec<T> splat_of(T x) { return x - Vec<T>{}; }
template <class To, class From> SPLAT_INLINE To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out;
  memcpy(&out, &v, sizeof out);
  return out;
}

/// 0, 1, 2, ...
template <class T> SPLAT_INLINE Vec<Int<T>> lane_numbers() {
  Vec<Int<T>> numbers = {};
  for (int n = 0; n < kWidth<T>; ++n) numbers[n] = n;
  return numbers;
}

/// The larger; the second where one is NaN.
template <class T> SPLAT_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#ifdef SPLAT_AVX512
  if constexpr (sizeof(T) == 4) asm("vmaxps %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
  else asm("vmaxpd %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
  return a;
#else
  return a > b ? a : b;
#endif
}

/// The smaller; the second where one is NaN.
template <class T> SPLAT_INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
#ifdef SPLAT_AVX512
  if constexpr (sizeof(T) == 4) asm("vminps %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
  else asm("vminpd %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
  return a;
#else
  return a < b ? a : b;
#endif
}

template <class T> SPLAT_INLINE bool any(Vec<Int<T>> mask) {
  Int<T> bits = 0;
  for (int n = 0; n < kWidth<T>; ++n) bits |= mask[n];
  return bits != 0;
}

/// a[n] > b[n] for some n.
template <class T> SPLAT_INLINE bool any_greater(Vec<T> a, Vec<T> b) {
#ifdef SPLAT_AVX512
  uint16_t bits;
  if constexpr (sizeof(T) == 4) asm("vcmpgtps %2, %1, %%k1\n\tkmovw %%k1, %k0" : "=r"(bits) : "v"(a), "v"(b) : "k1");
  else asm("vcmpgtpd %2, %1, %%k1\n\tkmovw %%k1, %k0" : "=r"(bits) : "v"(a), "v"(b) : "k1");
  return bits != 0;
#else
  return any<T>(a > b);
#endif
}

template <class T> constexpr T kInfinity = (T)__builtin_inf();
template <class T> constexpr T kLog2e = (T)1.44269504088896340736;
template <class T> constexpr T kLn2 = (T)0.69314718055994530942;

/// 2^f for f in [0, 1]: minimax polynomials; relative error 7.5e-8 (float), 5e-16 (double).
template <class T> SPLAT_INLINE Vec<T> exp2_fraction(Vec<T> f) {
  if constexpr (sizeof(T) == 4) {
    Vec<T> p = f * 0.0018775766626893977f + 0.00898934016302011f;
    p = p * f + 0.05582631794702983f;
    p = p * f + 0.2401536171030904f;
    p = p * f + 0.6931530731881044f;
    return p * f + 0.9999999250641667f;
  } else {
    constexpr double c[] = {1.0, 0.6931471805599473, 0.24022650695901776, 0.05550410866615061, 0.009618129095973559,
                            0.0013333558773232603, 0.00015403508484375858, 1.525324492185521e-05,
                            1.3207496204537972e-06, 1.0260281809349508e-07, 6.5260967373736275e-09,
                            6.332864917835891e-10};
    Vec<T> p = splat_of(c[11]);
    SPLAT_UNROLL
    for (int n = 10; n >= 0; --n) p = p * f + c[n];
    return p;
  }
}

/// 2^f for f in [0, 1] for weights that are rounded to 8 bits: relative error 2.6e-6.
SPLAT_INLINE Vec<float> exp2_fraction_short(Vec<float> f) {
  Vec<float> p = f * 0.01353416778994265f + 0.052011461218991695f;
  p = p * f + 0.24144275623067954f;
  p = p * f + 0.6930038346948082f;
  return p * f + 1.0000025933523997f;
}

/// 2^x for x < 128 (1,024); 0 below the normal numbers. `kShort`: `exp2_fraction_short`.
template <class T, bool kShort = false> SPLAT_INLINE Vec<T> exp2(Vec<T> x) {
  Vec<T> f;
#ifdef SPLAT_AVX512
  if constexpr (sizeof(T) == 4) asm("vreduceps $9, %1, %0" : "=v"(f) : "v"(x));  // x - floor(x)
  else asm("vreducepd $9, %1, %0" : "=v"(f) : "v"(x));
  Vec<T> p;
  if constexpr (kShort) p = exp2_fraction_short(f);
  else p = exp2_fraction<T>(f);
  if constexpr (sizeof(T) == 4) asm("vscalefps %2, %1, %0" : "=v"(p) : "v"(p), "v"(x));  // p * 2^floor(x)
  else asm("vscalefpd %2, %1, %0" : "=v"(p) : "v"(p), "v"(x));
  return p;
#else
  constexpr T magic = sizeof(T) == 4 ? (T)12582912.0 : (T)6755399441055744.0;  // 1.5 * 2^(bits of the mantissa)
  constexpr T least = sizeof(T) == 4 ? (T)-126 : (T)-1022;
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  const Vec<T> rounded = (x - (T)0.5) + magic;
  f = x - (rounded - magic);
  const Vec<T> p = exp2_fraction<T>(f);
  const Vec<T> out = bits_as<Vec<T>>(bits_as<Vec<Int<T>>>(p) + (bits_as<Vec<Int<T>>>(rounded) << mantissa));
  return x < least ? Vec<T>{} : out;  // NaN stays NaN
#endif
}

/// tanh, with a relative error of a few roundings: a cap that is far above all scores leaves them as they are.
template <class T> SPLAT_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> e = exp2<T>(smaller<T>(splat_of((T)64), x * (2 * kLog2e<T>)));
  const Vec<T> large = (T)1 - (T)2 / (e + (T)1), s = x * x;
  Vec<T> series = s * (T)(-1382.0 / 155925) + (T)(62.0 / 2835);
  series = series * s + (T)(-17.0 / 315);
  series = series * s + (T)(2.0 / 15);
  series = series * s + (T)(-1.0 / 3);
  return s < (T)(sizeof(T) == 4 ? 0.1 : 2e-3) ? x + x * (series * s) : large;
}

/// log2 of positive normal numbers, with an error of about one rounding.
template <class T> SPLAT_INLINE Vec<T> log2(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    // x = 2^e m with m between 1/sqrt(2) and sqrt(2); log(m) = 2 artanh(t), t = (m - 1) / (m + 1).
    const Vec<int32_t> bits = bits_as<Vec<int32_t>>(x), e = (bits - 0x3f3504f3) >> 23;
    const Vec<float> m = bits_as<Vec<float>>(bits - (e << 23)), t = (m - 1.0f) / (m + 1.0f), s = t * t;
    const Vec<float> series = ((s * (1.0f / 9) + 1.0f / 7) * s + 1.0f / 5) * s + 1.0f / 3;
    return __builtin_convertvector(e, Vec<float>) + t * (2 * kLog2e<float>) * (series * s + 1.0f);
  } else {
    for (int n = 0; n < kWidth<T>; ++n) x[n] = __builtin_log2(x[n]);
    return x;
  }
}

// -- storage types ---------------------------------------------------------------------------------------------------

SPLAT_INLINE float to_compute(float x) { return x; }
SPLAT_INLINE double to_compute(double x) { return x; }
SPLAT_INLINE float to_compute(bfloat16 x) { return bits_as<float>((uint32_t)x.bits << 16); }
SPLAT_INLINE float to_compute(float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // Subnormal numbers are made as a difference, because subnormal operands count as 0 here.
  if (rest < 0x0400) {
    const float tiny = bits_as<float>(0x38800000u + (rest << 13)) - bits_as<float>(0x38800000u);
    return bits_as<float>(bits_as<uint32_t>(tiny) | sign);
  }
  const uint32_t exponent = rest >= 0x7c00 ? (255 - 31) << 23 : (127 - 15) << 23;
  return bits_as<float>(((rest << 13) + exponent) | sign);
}

template <class Scalar> SPLAT_INLINE Scalar from_compute(Compute<Scalar> x) {
  if constexpr (sizeof(Scalar) >= 4) {
    return x;
  } else if constexpr (__is_same(Scalar, bfloat16)) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {(uint16_t)((bits >> 16) | 0x40)};
    return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    const uint32_t bits = bits_as<uint32_t>(x), rest = bits & 0x7fffffff;
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    if (rest > 0x7f800000) return {(uint16_t)(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // 65520 and more
    if (rest < 0x38800000) {                                     // below 2^-14: units of 2^-24, by adding 2^-1
      const uint32_t units = bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000;
      return {(uint16_t)(sign | units)};
    }
    return {(uint16_t)(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
  }
}

template <class To, class From> SPLAT_INLINE auto converted(From v) { return __builtin_convertvector(v, To); }

/// kWidth numbers, each in the lower half of its lane.
SPLAT_INLINE Vec<uint32_t> lower_halves(const bfloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  Half half;
  memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, Vec<uint32_t>);
}

/// kWidth elements in the compute type.
template <class Scalar> SPLAT_INLINE Vec<Compute<Scalar>> load_as(const Scalar* from) {
  using T = Compute<Scalar>;
  if constexpr (sizeof(Scalar) >= 4) {
    return load<T>(from);
  } else if constexpr (__is_same(Scalar, bfloat16)) {
    return bits_as<Vec<T>>(lower_halves(from) << 16);
  } else {
#if defined(SPLAT_F16C)
    Vec<T> v;
    asm("vcvtph2ps %1, %0" : "=v"(v) : "m"(*(const char(*)[kVectorBytes / 2])from));
    return v;
#elif defined(__aarch64__)
    Vec<T> v;
    double half;  // four of them
    memcpy(&half, from, sizeof half);
    asm("fcvtl %0.4s, %1.4h" : "=w"(v) : "w"(half));
    return v;
#else
    T out[kWidth<T>];
    for (int n = 0; n < kWidth<T>; ++n) out[n] = to_compute(from[n]);
    return load<T>(out);
#endif
  }
}

/// kWidth elements rounded to the storage type.
template <class Scalar> SPLAT_INLINE void store_as(Scalar* to, Vec<Compute<Scalar>> v) {
  if constexpr (sizeof(Scalar) >= 4) {
    store(to, v);
  } else if constexpr (__is_same(Scalar, bfloat16)) {
#if defined(SPLAT_AVX512) && defined(__AVX512BF16__)
    typedef uint16_t Sixteen __attribute__((vector_size(32)));
    Sixteen out;
    asm("vcvtneps2bf16 %1, %0" : "=v"(out) : "v"(v));
    memcpy(to, &out, sizeof out);
    return;
#endif
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    const Vec<uint32_t> bits = bits_as<Vec<uint32_t>>(v);
    const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t> chosen = v == v ? rounded : ((bits >> 16) | 0x40);
    const Half half = __builtin_convertvector(chosen, Half);
    memcpy(to, &half, sizeof half);
  } else {
#if defined(SPLAT_F16C)
    asm("vcvtps2ph $0, %1, %0" : "=m"(*(char(*)[kVectorBytes / 2])to) : "v"(v));
#elif defined(__aarch64__)
    double half;
    asm("fcvtn %0.4h, %1.4s" : "=w"(half) : "w"(v));
    memcpy(to, &half, sizeof half);
#else
    for (int n = 0; n < kWidth<float>; ++n) to[n] = from_compute<Scalar>(v[n]);
#endif
  }
}

/// kWidth numbers of either, side by side: the first in the lower half.
SPLAT_INLINE Vec<uint32_t> paired(const bfloat16* first, const bfloat16* second) {
  return lower_halves(first) | lower_halves(second) << 16;
}
/// Two numbers of each lane, rounded: the first in the lower half.
SPLAT_INLINE Vec<uint32_t> paired(Vec<float> first, Vec<float> second) {
  return ((bits_as<Vec<uint32_t>>(first) + 0x8000u) >> 16) | ((bits_as<Vec<uint32_t>>(second) + 0x8000u) & 0xffff0000u);
}

// -- between lanes ---------------------------------------------------------------------------------------------------

/// The elements of a and then b that have these numbers.
template <class T, int... n> SPLAT_INLINE Vec<T> chosen(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, n...);
#else
  return __builtin_shuffle(a, b, Vec<Int<T>>{n...});
#endif
}

template <class T> using Lanes = std::make_integer_sequence<int, kWidth<T>>;

/// The sum of all lanes.
template <class T, int h, int... n> SPLAT_INLINE T sum_of(Vec<T> v, std::integer_sequence<int, n...> lanes) {
  v += chosen<T, (n ^ h)...>(v, v);
  if constexpr (h > 1) return sum_of<T, h / 2>(v, lanes);
  else return v[0];
}
template <class T> SPLAT_INLINE T sum_of(Vec<T> v) { return sum_of<T, kWidth<T> / 2>(v, Lanes<T>{}); }

/// Between rows a and b, what a has in lanes with the bit h and what b has in those without it change places.
template <class T, int h, int... n> SPLAT_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, n...>) {
  constexpr int W = kWidth<T>;
  const Vec<T> low = chosen<T, (n & h ? W + n - h : n)...>(a, b);
  b = chosen<T, (n & h ? W + n : n + h)...>(a, b);
  a = low;
}

/// The square of kWidth vectors of T, transposed in place: log2(kWidth) rounds of exchanges.
template <class T, int h = 1> SPLAT_INLINE void transpose(Vec<T> (&rows)[kWidth<T>]) {
  constexpr int W = kWidth<T>;
  if constexpr (h < W) {
    SPLAT_UNROLL
    for (int i = 0; i < W; ++i)
      if (!(i & h)) exchange<T, h>(rows[i], rows[i + h], Lanes<T>{});
    transpose<T, 2 * h>(rows);
  }
}

/// The sums of kWidth vectors' lanes, that of rows[n] in lane n: half as many vectors after each round of exchanges.
template <class T, int h = 1> SPLAT_INLINE Vec<T> lane_sums(Vec<T> (&rows)[kWidth<T>]) {
  constexpr int W = kWidth<T>;
  if constexpr (h < W) {
    SPLAT_UNROLL
    for (int i = 0; i < W; i += 2 * h) {
      exchange<T, h>(rows[i], rows[i + h], Lanes<T>{});
      rows[i] += rows[i + h];
    }
    return lane_sums<T, 2 * h>(rows);
  }
  return rows[0];
}

}  // namespace splat
