"""What generated score modifications are spelled with, where Triton has no word, or another meaning, for what JAX does.

Operands are float32, int32 or int1 tiles; integers of fewer bits are computed as int32 and made to come around.
"""

import triton
import triton.language as tl

from splat.codegen.triton.kernels.tiles import LN2, LOG2E, tanh

# -- where a score is --------------------------------------------------------------------------------------------------


@triton.jit
def where_of(WHERE, pair):
    """(batch entry, head) of the whole call, and the position of row 0: WHERE int32 [B, N, 3]."""
    at = WHERE + 3 * pair
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


# -- conditions and integers -------------------------------------------------------------------------------------------


@triton.jit
def negated(a):
    return a == 0


@triton.jit
def choose_condition(condition, a, b):
    return (condition & a) | ((condition == 0) & b)


@triton.jit
def least_whole(a, b):
    return tl.minimum(a, b)


@triton.jit
def most_whole(a, b):
    return tl.maximum(a, b)


@triton.jit
def clamp_whole(low, x, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def sign_whole(a):
    return (a > 0).to(tl.int32) - (a < 0).to(tl.int32)


@triton.jit
def plus(a, b):
    """Sums, differences and products of integers come around."""
    return tl.add(a, b, sanitize_overflow=False)


@triton.jit
def minus(a, b):
    return tl.sub(a, b, sanitize_overflow=False)


@triton.jit
def times(a, b):
    return tl.mul(a, b, sanitize_overflow=False)


@triton.jit
def quotient(a, b):
    """Rounded towards 0; by 0 it is -1, as XLA has it."""
    return tl.where(b == 0, -1, tl.where(b == -1, minus(0, a), a // tl.where((b == 0) | (b == -1), 1, b)))


@triton.jit
def remainder(a, b):
    return tl.where(b == 0, a, a % tl.where((b == 0) | (b == -1), 1, b))


@triton.jit
def shift_left(a, by, BITS: tl.constexpr):
    """By as many bits as the type has, or by less than none, nothing is left."""
    inside = (by >= 0) & (by < BITS)
    return tl.where(inside, a << tl.where(inside, by, 0), 0)


@triton.jit
def shift_right(a, by, BITS: tl.constexpr):
    """... but the sign."""
    return a >> tl.where((by >= 0) & (by < BITS), by, BITS - 1)


@triton.jit
def power_whole(a, N: tl.constexpr):
    if N == 1:
        return a
    elif N % 2 == 1:
        return times(a, power_whole(a, N - 1))
    else:
        return power_whole(times(a, a), N // 2)


@triton.jit
def wrapped_int8(a):
    return (a << 24) >> 24


@triton.jit
def wrapped_int16(a):
    return (a << 16) >> 16


@triton.jit
def wrapped_uint8(a):
    return a & 0xFF


@triton.jit
def wrapped_uint16(a):
    return a & 0xFFFF


@triton.jit
def nearest_whole(a, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The nearest number of a type, 0 for NaN, as XLA has it."""
    inside = (a > LEAST) & (a < MOST)
    edge = tl.where(a >= MOST, MOST, tl.where(a <= LEAST, LEAST, 0))
    return tl.where(inside, tl.where(inside, a, 0.0).to(tl.int32), edge)


@triton.jit
def to_whole_int32(a):
    inside = (a >= -2147483648.0) & (a < 2147483648.0)
    edge = tl.where(a >= 2147483648.0, 2147483647, tl.where(a < -2147483648.0, -2147483648, 0))
    return tl.where(inside, tl.where(inside, a, 0.0).to(tl.int32), edge)


@triton.jit
def to_whole_int8(a):
    return nearest_whole(a, -128, 127)


@triton.jit
def to_whole_int16(a):
    return nearest_whole(a, -32768, 32767)


@triton.jit
def to_whole_uint8(a):
    return nearest_whole(a, 0, 255)


@triton.jit
def to_whole_uint16(a):
    return nearest_whole(a, 0, 65535)


# -- real numbers ------------------------------------------------------------------------------------------------------


@triton.jit
def to_real(a):
    return a.to(tl.float32)


@triton.jit
def least_real(a, b):
    """NaN where one of them is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def most_real(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def clamp_real(low, x, high):
    return least_real(most_real(x, low), high)


@triton.jit
def absolute(a):
    return tl.abs(a)


@triton.jit
def sign_real(a):
    return tl.where(a > 0.0, 1.0, tl.where(a < 0.0, -1.0, a))


@triton.jit
def power_real(a, N: tl.constexpr):
    """a^N for a positive N, as often squared as can be."""
    if N == 1:
        return a
    elif N % 2 == 1:
        return a * power_real(a, N - 1)
    else:
        return power_real(a * a, N // 2)


@triton.jit
def exp_real(a):
    return tl.exp(a)


@triton.jit
def exp2_real(a):
    return tl.exp2(a)


@triton.jit
def log_real(a):
    return tl.log(a)


@triton.jit
def tanh_real(a):
    """Accurate near 0, too."""
    small = a * a
    near = a * (1.0 + small * (-0.33333333 + small * (0.13333333 - small * 0.05396825)))
    return tl.where(tl.abs(a) < 0.25, near, tanh(a))


@triton.jit
def logistic(a):
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def root(a):
    return tl.sqrt_rn(a)


@triton.jit
def log1p(a):
    """Of a small number, log(1 + a) times what rounding made of a in 1 + a (Kahan)."""
    more = 1.0 + a
    exact = more - 1.0
    some = (exact != 0.0) & (tl.abs(more) < float("inf"))
    return tl.where(some, tl.log(more) * (a / tl.where(some, exact, 1.0)), tl.where(exact == 0.0, a, tl.log(more)))


@triton.jit
def expm1(a):
    """2^(n/2) times sinh of half the exponent where that is small: e^a - 1 = 2 e^(a/2) sinh(a/2)."""
    half = 0.5 * a
    square = half * half
    series = 1.0 + square * (0.16666667 + square * (0.0083333333 + square * 0.0001984127))
    return tl.where(tl.abs(a) < 1.0, 2.0 * tl.exp(half) * (half * series), tl.exp(a) - 1.0)


@triton.jit
def sinh(a):
    small = a * a
    series = a * (1.0 + small * (0.16666667 + small * (0.0083333333 + small * 0.0001984127)))
    half = tl.exp(0.5 * tl.abs(a))
    large = 0.5 * half * half - 0.5 / half / half
    return tl.where(tl.abs(a) < 1.0, series, tl.where(a < 0.0, -large, large))


@triton.jit
def cosh(a):
    half = tl.exp(0.5 * tl.abs(a))
    return 0.5 * half * half + 0.5 / half / half


@triton.jit
def cbrt(a):
    """Newton's step from 2^(log2|a| / 3)."""
    size = tl.abs(a)
    some = (size > 0.0) & (size < float("inf"))
    safe = tl.where(some, size, 1.0)
    guess = tl.exp2(tl.log2(safe) * 0.33333333)
    guess = guess - (guess - safe / (guess * guess)) * 0.33333333
    guess = tl.where(some, guess, size)
    return tl.where(a < 0.0, -guess, guess)


@triton.jit
def sin(a):
    return tl.sin(a)


@triton.jit
def cos(a):
    return tl.cos(a)


@triton.jit
def tan(a):
    return tl.sin(a) / tl.cos(a)


@triton.jit
def atan(a):
    """As in Cephes: about 0, about 1 and about infinity."""
    size = tl.abs(a)
    far = size > 2.414213562373095
    near = (size > 0.4142135623730950) & (far == 0)
    shift = tl.where(far, 1.5707963267948966, tl.where(near, 0.7853981633974483, 0.0))
    x = tl.where(far, -1.0 / tl.where(far, size, 1.0), tl.where(near, (size - 1.0) / (size + 1.0), size))
    square = x * x
    series = ((8.05374449538e-2 * square - 1.38776856032e-1) * square + 1.99777106478e-1) * square - 3.33329491539e-1
    out = shift + (series * square * x + x)
    return tl.where(a < 0.0, -out, out)


@triton.jit
def atan2(a, b):
    """The angle of (b, a); signs of zeros are not told apart."""
    steep = tl.abs(a) > tl.abs(b)
    over, under = tl.where(steep, b, a), tl.where(steep, a, b)
    both = (tl.abs(over) == float("inf")) & (tl.abs(under) == float("inf"))
    ratio = tl.where(under == 0.0, 0.0, over / tl.where(under == 0.0, 1.0, under))
    ratio = tl.where(both, tl.where((over < 0.0) == (under < 0.0), 1.0, -1.0), ratio)
    flat = atan(ratio)
    quarter = tl.where(a < 0.0, -1.5707963267948966, 1.5707963267948966)
    behind = tl.where(b < 0.0, tl.where(a < 0.0, -3.141592653589793, 3.141592653589793), 0.0)
    return tl.where((a != a) | (b != b), a + b, tl.where(steep, quarter - flat, flat + behind))


@triton.jit
def asin(a):
    return atan2(a, tl.sqrt_rn((1.0 - a) * (1.0 + a)))


@triton.jit
def acos(a):
    return 2.0 * atan2(tl.sqrt_rn(1.0 - a), tl.sqrt_rn(1.0 + a))


@triton.jit
def asinh(a):
    size = tl.abs(a)
    large = size > 1.0e9
    safe = tl.where(large, 1.0, size)
    square = safe * safe
    out = tl.where(large, tl.log(size) + LN2, log1p(safe + square / (1.0 + tl.sqrt_rn(1.0 + square))))
    return tl.where(a < 0.0, -out, out)


@triton.jit
def acosh(a):
    large = a > 1.0e9
    safe = tl.where(large, 1.0, a) - 1.0
    return tl.where(large, tl.log(a) + LN2, log1p(safe + tl.sqrt_rn(safe * (safe + 2.0))))


@triton.jit
def atanh(a):
    return 0.5 * (log1p(a) - log1p(-a))


@triton.jit
def erf(a):
    return tl.erf(a)


@triton.jit
def floor(a):
    return tl.floor(a)


@triton.jit
def ceil(a):
    return tl.ceil(a)


@triton.jit
def round(a):
    """Halves go away from 0."""
    whole = tl.floor(tl.abs(a))
    whole = whole + tl.where(tl.abs(a) - whole >= 0.5, 1.0, 0.0)
    return tl.where(a < 0.0, -whole, whole)


@triton.jit
def rint(a):
    """Halves go to the even number."""
    whole = tl.floor(a)
    rest = a - whole
    up = (rest > 0.5) | ((rest == 0.5) & (whole * 0.5 != tl.floor(whole * 0.5)))
    return tl.where(tl.abs(a) < 8388608.0, whole + tl.where(up, 1.0, 0.0), a)


@triton.jit
def pow(a, b):
    """2^(b log2|a|), the logarithm in two parts: of the power of two nearby, and of the rest."""
    size = tl.abs(a)
    some = (size > 0.0) & (size < float("inf"))
    safe = tl.where(some, size, 1.0)
    whole = tl.floor(tl.log2(safe) + 0.5)
    rest = log1p(safe * tl.exp2(-whole) - 1.0) * LOG2E
    finite = tl.minimum(tl.maximum(b, -1.0e30), 1.0e30)
    high = finite * whole
    low = finite * rest
    near = tl.abs(high + low) < 1000.0
    first = tl.where(near, tl.floor(high + low), 0.0)
    out = tl.where(near, tl.exp2(first) * tl.exp2((high - first) + low), tl.exp2(high + low))
    out = tl.where(some, out, tl.where((size == 0.0) == (b > 0.0), 0.0, float("inf")))
    odd = tl.floor(b * 0.5) * 2.0 != b
    signed = tl.where(tl.floor(b) != b, float("nan"), tl.where(odd, -out, out))
    out = tl.where((a < 0.0) & (size > 0.0), signed, out)
    return tl.where((b == 0.0) | (a == 1.0), 1.0, tl.where((a != a) | (b != b), a + b, out))


@triton.jit
def fmod(a, b):
    """The rest of a division rounded towards 0, with the sign of a."""
    size = tl.abs(b)
    rest = tl.abs(a)
    rest = rest - size * tl.floor(rest / size)
    rest = tl.where(rest < 0.0, rest + size, tl.where(rest >= size, rest - size, rest))
    return tl.where(a < 0.0, -rest, rest)


@triton.jit
def erfc(a):
    return 1.0 - tl.erf(a)
