// The kernels, for the instruction set that the including file has chosen; in the order pairs, triplets,
// packing, tiles. They use nothing but pointers and vectors: no function of a shared header may be
// instantiated here, for the linker could hand it to code that runs on every machine.

namespace triplet_ext {
namespace {

#include "simd.h"

// --- pairs ----------------------------------------------------------------------------------------------------

template <typename T>
TRIPLET_INLINE bool finite(T x) {
  return __builtin_fabs(x) <= std::numeric_limits<T>::max();
}

template <typename T>
TRIPLET_INLINE void clear(T* x, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) x[k] = 0;
}

// The sum over the features of f(x, y), in four chains per lane.
template <typename T, typename F>
TRIPLET_INLINE T sum_over(const T* x, const T* y, int64_t depth, F f) {
  using V = typename Simd<T>::V;
  constexpr int W = kWidth<T>;
  V s0{}, s1{}, s2{}, s3{};
  int64_t k = 0;
  for (; k + 4 * W <= depth; k += 4 * W) {
    s0 += f(load(x + k), load(y + k));
    s1 += f(load(x + k + W), load(y + k + W));
    s2 += f(load(x + k + 2 * W), load(y + k + 2 * W));
    s3 += f(load(x + k + 3 * W), load(y + k + 3 * W));
  }
  for (; k + W <= depth; k += W) s0 += f(load(x + k), load(y + k));
  T rest = 0;
  for (; k < depth; ++k) rest += f(broadcast(x[k]), broadcast(y[k]))[0];
  return sum<T>((s0 + s1) + (s2 + s3)) + rest;
}

template <typename T>
struct Unit {
  T inverse;  // 1 / max(norm, floor); NaN where the norm overflows, lest the row become zeros
  T lack;     // what the squared norm of the scaled row lacks to 1; above 0 where the floor holds
};

template <typename T>
TRIPLET_INLINE Unit<T> unit_of(const T* x, int64_t depth) {
  const T floor = T(kCosineFloor * kCosineFloor);
  const T square = sum_over(x, x, depth, [](auto a, auto b) { return a * b; });
  if (!finite(square)) return {std::numeric_limits<T>::quiet_NaN(), 0};
  const T lack = 1 - square / floor;
  return {1 / T(__builtin_sqrt(square > floor ? square : floor)), lack > 0 ? lack : T(0)};
}

template <typename T>
TRIPLET_INLINE T power(T x, T p) {
  return T(__builtin_pow(x, p));
}

// |x - y + eps|_p for the p that have no vector form of their own.
template <typename T>
static T p_norm(const T* x, const T* y, int64_t depth, T p, T eps) {
  // Of one feature, no power and its root, which may not be what came in; nor in torch.
  if (depth == 1 && p != 0) return T(__builtin_fabs(x[0] - y[0] + eps));
  T s = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const T d = T(__builtin_fabs(x[k] - y[k] + eps));
    if (p == 0) s += d != 0;
    else if (p == 1) s += d;
    else if (p == std::numeric_limits<T>::infinity()) s = d > s || d != d ? d : s;
    else s += power(d, p);
  }
  return p == 0 || p == 1 || p == std::numeric_limits<T>::infinity() ? s : power(s, 1 / p);
}

// d |x|_p / dx for one feature, with torch's conventions at 0 and between equal maxima.
template <typename T>
TRIPLET_INLINE T p_norm_slope(T x, T norm, T maxima, T p) {
  const T sign = T((x > 0) - (x < 0));
  if (p == 0) return 0;
  if (p == 1) return sign;
  if (p == std::numeric_limits<T>::infinity()) return __builtin_fabs(x) == norm ? sign / maxima : T(0);
  if (norm == 0 || x == 0) return 0;
  return sign * power(T(__builtin_fabs(x)), p - 1) / power(norm, p - 1);
}

template <typename T>
TRIPLET_INLINE T distance_of(const T* x, const T* y, int64_t depth, const Measure& measure) {
  switch (measure.distance) {
    case Distance::PNorm: {
      if (measure.p != 2) return p_norm(x, y, depth, T(measure.p), T(measure.eps));
      const T eps = T(measure.eps);
      return T(__builtin_sqrt(sum_over(x, y, depth, [eps](auto a, auto b) {
        const auto d = a - b + eps;
        return d * d;
      })));
    }
    case Distance::Cosine: {
      const Unit<T> u = unit_of(x, depth), v = unit_of(y, depth);
      const T square = sum_over(x, y, depth, [u, v](auto a, auto b) {
        const auto d = a * u.inverse - b * v.inverse;
        return d * d;
      });
      return (square + u.lack + v.lack) / 2;
    }
    default: {
      const T square = sum_over(x, y, depth, [](auto a, auto b) {
        const auto d = a - b;
        return d * d;
      });
      return measure.distance == Distance::Euclidean ? T(__builtin_sqrt(square)) : square;
    }
  }
}

// --- triplets -------------------------------------------------------------------------------------------------

template <typename T>
static void forward(const TripletTask<T>& task, int64_t begin, int64_t end, T* losses, double* sums) {
  const Measure& measure = task.measure;
  double total[kSums] = {};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t ia = task.a ? task.a[t] : t, ip = task.p ? task.p[t] : t, in = task.n ? task.n[t] : t;
    const T* a = task.anchor.row(ia);
    T ap = 0, an = 0, pn = 0, loss = 0;
    if (ip >= 0 && in >= 0) {
      const T* p = task.positive.row(ip);
      const T* n = task.negative.row(in);
      ap = distance_of(a, p, task.depth, measure);
      an = distance_of(a, n, task.depth, measure);
      if (measure.swap) pn = distance_of(p, n, task.depth, measure);
      const T negative = negative_distance_of(an, pn, measure.swap);
      loss = triplet_loss_of(triplet_excess_of(ap, negative, measure), measure);
      total[kSumTriplets] += 1;
      total[kSumActive] += loss > 0;
      total[kSumPositive] += ap;
      total[kSumNegative] += negative;
    } else if (!finite(sum_over(a, a, task.depth, [](auto x, auto) { return x * T(0); }))) {
      loss = std::numeric_limits<T>::quiet_NaN();  // a row that is not finite is never left out
    }
    total[kSumLoss] += loss;
    task.distances[t] = ap;
    task.distances[task.count + t] = an;
    if (measure.swap) task.distances[2 * task.count + t] = pn;
    if (losses) losses[t] = loss;
  }
  for (int i = 0; i < kSums; ++i) sums[i] = total[i];
}

// The gradients of one triplet where each pair pulls along its difference: ga = u (a-p) + v (a-n),
// gp = -u (a-p) + w (p-n), gn = -v (a-n) - w (p-n).
template <bool swap, typename T>
TRIPLET_INLINE void pull_apart(const T* a, const T* p, const T* n, int64_t depth, T u, T v, T w, T eps, T* ga, T* gp,
                               T* gn) {
  int64_t k = 0;
  const auto step = [&](auto at, auto put) {
    const auto xa = at(a), xp = at(p), xn = at(n);
    const auto ap = u * (xa - xp + eps), an = v * (xa - xn + eps);
    if constexpr (swap) {
      const auto pn = w * (xp - xn + eps);
      put(ga, ap + an);
      put(gp, pn - ap);
      put(gn, -an - pn);
    } else {
      put(ga, ap + an);
      put(gp, -ap);
      put(gn, -an);
    }
  };
  for (; k + kWidth<T> <= depth; k += kWidth<T>)
    step([k](const T* x) { return load(x + k); }, [k](T* x, auto value) { store(x + k, value); });
  for (; k < depth; ++k) step([k](const T* x) { return x[k]; }, [k](T* x, T value) { x[k] = value; });
}

// Adds weight * dd(x, y) to gx and gy, for the distances whose gradient is no multiple of x - y.
template <typename T>
static void add_pair_gradient(const T* x, const T* y, int64_t depth, T weight, T distance, const Measure& measure,
                              T* gx, T* gy) {
  if (measure.distance == Distance::Cosine) {
    // -(v - (u.v) u) / |x| where u.v = 1 - d; below the floor the norm is a constant.
    const Unit<T> u = unit_of(x, depth), v = unit_of(y, depth);
    const T along_u = u.lack > 0 ? T(1) : distance, along_v = v.lack > 0 ? T(1) : distance;
    for (int64_t k = 0; k < depth; ++k) {
      const T xk = x[k] * u.inverse, yk = y[k] * v.inverse;
      gx[k] += weight * u.inverse * ((xk - yk) - along_u * xk);
      gy[k] += weight * v.inverse * ((yk - xk) - along_v * yk);
    }
    return;
  }
  const T p = T(measure.p), eps = T(measure.eps);
  T maxima = 0;
  for (int64_t k = 0; k < depth; ++k) maxima += __builtin_fabs(x[k] - y[k] + eps) == distance;
  for (int64_t k = 0; k < depth; ++k) {
    const T g = weight * p_norm_slope(T(x[k] - y[k] + eps), distance, maxima, p);
    gx[k] += g;
    gy[k] -= g;
  }
}

template <typename T>
static void backward(const TripletTask<T>& task, int64_t begin, int64_t end, const T* weight, int64_t weight_step,
                     T scale, T* grad_anchor, T* grad_positive, T* grad_negative) {
  const Measure& measure = task.measure;
  const int64_t depth = task.depth, count = task.count;
  const bool straight = measure.distance == Distance::SquaredEuclidean || measure.distance == Distance::Euclidean ||
                        (measure.distance == Distance::PNorm && measure.p == 2);
  const T eps = measure.distance == Distance::PNorm ? T(measure.eps) : T(0);
  for (int64_t t = begin; t < end; ++t) {
    const T ap = task.distances[t], an = task.distances[count + t];
    const T pn = measure.swap ? task.distances[2 * count + t] : T(0);
    const T excess = triplet_excess_of(ap, negative_distance_of(an, pn, measure.swap), measure);
    const T slope = triplet_slope_of(excess, measure) * (weight[t * weight_step] * scale);
    const T share = swapped_share_of(an, pn, measure);
    const T to_an = share == 1 ? T(0) : -slope * (1 - share), to_pn = share == 0 ? T(0) : -slope * share;
    T* ga = grad_anchor + t * depth;
    T* gp = grad_positive + t * depth;
    T* gn = grad_negative + t * depth;
    const bool third = share != 0 || (measure.swap && !finite(pn));
    const bool idle = slope == 0 && finite(excess);  // what is not finite is to be seen in the gradient
    if (idle || !straight) {
      clear(ga, depth);
      clear(gp, depth);
      clear(gn, depth);
      if (idle) continue;  // an inactive triplet costs no reads
    }
    const T* a = task.anchor.row(t);
    const T* p = task.positive.row(t);
    const T* n = task.negative.row(t);
    if (straight) {
      const T u = pull_of(slope, ap, measure), v = pull_of(to_an, an, measure);
      if (third) {
        pull_apart<true>(a, p, n, depth, u, v, pull_of(to_pn, pn, measure), eps, ga, gp, gn);
      } else {
        pull_apart<false>(a, p, n, depth, u, v, T(0), eps, ga, gp, gn);
      }
    } else {
      add_pair_gradient(a, p, depth, slope, ap, measure, ga, gp);
      if (share != 1 || !finite(an)) add_pair_gradient(a, n, depth, to_an, an, measure, ga, gn);
      if (third) add_pair_gradient(p, n, depth, to_pn, pn, measure, gp, gn);
    }
  }
}

// A sum of T, a float64 for each lane or two: of many equal terms, one of T would round the same way each time. Terms
// are added up in T a few at a time before they come here.
template <typename T>
struct Total {
  Simd<double>::V lanes[sizeof(double) / sizeof(T)];
};

TRIPLET_INLINE Simd<double>::V load_double(const float* p) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Simd<double>::V);
}
TRIPLET_INLINE Simd<double>::V load_double(const double* p) { return load(p); }

template <typename T>
TRIPLET_INLINE void add(Total<T>& total, typename Simd<T>::V terms) {
  T lanes[kWidth<T>];
  store(lanes, terms);
  for (size_t i = 0; i < sizeof(double) / sizeof(T); ++i) total.lanes[i] += load_double(lanes + i * kWidth<double>);
}

template <typename T>
TRIPLET_INLINE double sum(const Total<T>& total) {
  auto lanes = total.lanes[0];
  for (size_t i = 1; i < sizeof(double) / sizeof(T); ++i) lanes += total.lanes[i];
  return sum<double>(lanes);
}

constexpr int kPieceTerms = 64;  // of a gradient that are added up in T

// Where in a row an element is, or a vector.
template <typename T>
struct ElementAt {
  int64_t k;
  __attribute__((always_inline)) T operator()(const T* row) const { return row[k]; }
};
template <typename T>
struct VectorAt {
  int64_t k;
  __attribute__((always_inline)) typename Simd<T>::V operator()(const T* row) const { return load(row + k); }
};

// grad = the sum of term(e, at) over e < count, where at(row) is what of a row is asked for.
template <typename T, typename F>
TRIPLET_INLINE void add_up(int64_t depth, int64_t count, T* grad, F term) {
  using V = typename Simd<T>::V;
  constexpr int W = kWidth<T>, kChunk = 4;
  int64_t k = 0;
  for (; k + kChunk * W <= depth; k += kChunk * W) {
    V s[kChunk] = {};
    if (count <= kPieceTerms) {
      for (int64_t e = 0; e < count; ++e)
        for (int c = 0; c < kChunk; ++c) s[c] += term(e, VectorAt<T>{k + c * W});
      for (int c = 0; c < kChunk; ++c) store(grad + k + c * W, s[c]);
      continue;
    }
    Total<T> total[kChunk] = {};
    for (int64_t from = 0; from < count; from += kPieceTerms)
      for (int c = 0; c < kChunk; ++c) {
        s[c] = V{};
        for (int64_t e = from; e < count && e < from + kPieceTerms; ++e) s[c] += term(e, VectorAt<T>{k + c * W});
        add(total[c], s[c]);
      }
    for (int c = 0; c < kChunk; ++c)
      for (int l = 0; l < W; ++l) grad[k + c * W + l] = T(total[c].lanes[l / kWidth<double>][l % kWidth<double>]);
  }
  for (; k < depth; ++k) {
    double total = 0;
    for (int64_t e = 0; e < count; ++e) total += term(e, ElementAt<T>{k});
    grad[k] = T(total);
  }
}

template <typename T>
static void gather(const T* row, int64_t depth, bool cosine, const Pull<T>* pulls, int64_t count, T* grad) {
  if (!cosine) {
    add_up(depth, count, grad, [=](int64_t e, auto at) __attribute__((always_inline)) {
      return pulls[e].weight * (at(row) - at(pulls[e].other));
    });
    return;
  }
  clear(grad, depth);
  if (!count) return;
  const Unit<T> u = unit_of(row, depth);
  for (int64_t e = 0; e < count; ++e) {
    const Unit<T> v = unit_of(pulls[e].other, depth);
    const T weight = pulls[e].weight * u.inverse, along = u.lack > 0 ? T(1) : pulls[e].distance;
    for (int64_t k = 0; k < depth; ++k) {
      const T x = row[k] * u.inverse;
      grad[k] += weight * ((x - pulls[e].other[k] * v.inverse) - along * x);
    }
  }
}

// --- packing --------------------------------------------------------------------------------------------------

template <typename T>
static T inspect(Rows<T> x, int64_t rows, int64_t depth, uint8_t* is_finite) {
  using V = typename Simd<T>::V;
  constexpr int W = kWidth<T>;
  T largest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x.row(i);
    V most{}, poison{};  // x * 0 is NaN for what is not finite
    T rest = 0, poison_rest = 0;
    int64_t k = 0;
    for (; k + W <= depth; k += W) {
      const V v = load(row + k);
      poison += v * T(0);
      most = larger(most, larger(v, -v));
    }
    for (; k < depth; ++k) {
      poison_rest += row[k] * T(0);
      const T v = T(__builtin_fabs(row[k]));
      rest = v > rest ? v : rest;
    }
    is_finite[i] = finite(sum<T>(poison) + poison_rest);
    if (!is_finite[i]) continue;
    for (int l = 0; l < W; ++l) rest = most[l] > rest ? most[l] : rest;
    largest = rest > largest ? rest : largest;
  }
  return largest;
}

// The sum of square(k) over [begin, end), term by term, in the order of numpy.sum: up to 128 terms in eight chains,
// what is left of eights one by one, and halves of more. `squares(k)` puts eight terms into vectors.
template <typename Squares, typename Square>
TRIPLET_INLINE double sum_of_block(int64_t begin, int64_t end, Squares squares, Square square) {
  constexpr int W = kWidth<double>, kLanes = 8, kVectors = kLanes / W;
  double total = 0;
  int64_t k = begin;
  if (end - begin >= kLanes) {
    Simd<double>::V sums[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] = squares(k + v * W);
    for (k += kLanes; k + kLanes <= end; k += kLanes)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[v] += squares(k + v * W);
    double s[kLanes];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(s + v * W, sums[v]);
    total = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }
  for (; k < end; ++k) total += square(k);
  return total;
}

// Selections compare these sums, and plain PyTorch and NumPy are to compare the same numbers: bit by bit, also between
// instruction sets. Hence the order, and nothing is contracted.
template <bool scaled, typename T>
static __attribute__((noinline)) double sum_of_squares(const T* x, const T* y, int64_t begin, int64_t end,
                                                       double scale_x, double scale_y) {
  constexpr int64_t kBlock = 128;
  if (end - begin > kBlock) {
    const int64_t half = (end - begin) / 2, middle = begin + half - half % 8;
    return sum_of_squares<scaled>(x, y, begin, middle, scale_x, scale_y) +
           sum_of_squares<scaled>(x, y, middle, end, scale_x, scale_y);
  }
  const auto square = [=](auto a, auto b) __attribute__((always_inline)) {
    const auto d = scaled ? rounded(a * scale_x) - rounded(b * scale_y) : a - b;
    return rounded(d * d);
  };
  return sum_of_block(
      begin, end,
      [=](int64_t k) __attribute__((always_inline)) { return square(load_double(x + k), load_double(y + k)); },
      [=](int64_t k) __attribute__((always_inline)) { return square(double(x[k]), double(y[k])); });
}

// The squared norm of x * scale_x - y * scale_y, in float64.
template <typename T>
static double exact_square(const T* x, const T* y, int64_t depth, double scale_x, double scale_y) {
  return scale_x == 1 && scale_y == 1 ? sum_of_squares<false>(x, y, 0, depth, 1, 1)
                                      : sum_of_squares<true>(x, y, 0, depth, scale_x, scale_y);
}

template <typename T>
static double square(const T* x, int64_t depth) {
  return exact_square(x, x, depth, 1, 0);
}

template <typename T>
static void pack(const T* const* rows, const T* scale, const T* centre, int64_t depth, T* out, double* squares) {
  constexpr int P = kPanel<T>, kStep = 16;  // features at a time: a piece of each row, and of the panel, in L1
  double total[P] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += kStep) {
    const int64_t steps = depth - k0 < kStep ? depth - k0 : kStep;
    T* piece = out + k0 * P;
    for (int r = 0; r < P; ++r) {
      const T* row = rows[r];
      if (row) {
        for (int64_t k = 0; k < steps; ++k) piece[k * P + r] = row[k0 + k] * scale[r] - centre[k0 + k];
      } else {
        for (int64_t k = 0; k < steps; ++k) piece[k * P + r] = 0;
      }
    }
    for (int64_t k = 0; k < steps; ++k)
      for (int r = 0; r < P; ++r) total[r] += double(piece[k * P + r]) * double(piece[k * P + r]);
  }
  for (int r = 0; r < P; ++r) squares[r] = total[r];
}

// --- the tile engine ------------------------------------------------------------------------------------------

// Inner products of kTileRows packed rows at `a` with the rows of the panel at `b`, in registers: one chain of sums
// over the features.
template <typename T>
TRIPLET_INLINE void multiply_chain(const T* a, const T* b, int64_t depth,
                                   typename Simd<T>::V (&tile)[kTileRows][kTileVectors]) {
  using V = typename Simd<T>::V;
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kTileVectors; ++c) tile[r][c] = V{};
  for (int64_t k = 0; k < depth; ++k) {
    V column[kTileVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kTileVectors; ++c) column[c] = load(b + c * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) tile[r][c] += a[r] * column[c];
    a += kPanel<T>;
    b += kPanel<T>;
  }
}

// The inner products over all features, in chains, whose rounding errors are then bounded by that of so many
// sums. The order of the sums is the same in every tile, so that equal rows give equal products bit by bit.
template <typename T>
TRIPLET_INLINE void multiply(const T* a, const T* b, int64_t depth, int64_t chain,
                             typename Simd<T>::V (&tile)[kTileRows][kTileVectors]) {
  multiply_chain(a, b, depth < chain ? depth : chain, tile);
  for (int64_t k = chain; k < depth; k += chain) {
    typename Simd<T>::V more[kTileRows][kTileVectors];
    multiply_chain(a + k * kPanel<T>, b + k * kPanel<T>, depth - k < chain ? depth - k : chain, more);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) tile[r][c] += more[r][c];
  }
}

// Calls visit(tile, i, j, bp) with the values -d/2 of every tile of the block in which row i is the tile's
// first, row j its first column, and bp the panel of b; begin(i, panel) and end(i) around the tiles of each
// kTileRows rows of a. With `symmetric`, tiles below the diagonal are skipped, and where there is a `wanted`, those for
// which wanted(i, bp) is false.
struct Always {
  __attribute__((always_inline)) bool operator()(int64_t, int64_t) const { return true; }
};
template <typename T, typename Begin, typename Visit, typename End, typename Wanted = Always>
TRIPLET_INLINE void walk(const T* a_data, const T* a_bias, const Panels<T>& b, bool symmetric, Block block, Begin begin,
                         Visit visit, End end, Wanted wanted = {}, int64_t chain = kChain) {
  using V = typename Simd<T>::V;
  constexpr int P = kPanel<T>, W = kWidth<T>;
  for (int64_t ap = block.a_begin; ap < block.a_end; ++ap) {
    const int64_t from = symmetric && ap > block.b_begin ? ap : block.b_begin;
    for (int64_t i = ap * P; i < (ap + 1) * P; i += kTileRows) {
      begin(i, ap);
      for (int64_t bp = from; bp < block.b_end; ++bp) {
        if (!wanted(i, bp)) continue;
        V tile[kTileRows][kTileVectors];
        multiply(a_data + ap * P * b.depth + (i - ap * P), b.data + bp * P * b.depth, b.depth, chain, tile);
#pragma GCC unroll 4
        for (int c = 0; c < kTileVectors; ++c) {
          const V bias = load(b.bias + bp * P + c * W);
#pragma GCC unroll 8
          for (int r = 0; r < kTileRows; ++r) tile[r][c] -= bias + a_bias[i + r];
        }
        visit(tile, i, bp * P, bp);
      }
      end(i);
    }
  }
}

// The two best values of a lane, and where the best was.
template <typename T>
struct Lanes {
  typename Simd<T>::V best, second;
  typename Simd<T>::M index;
};

template <typename T>
TRIPLET_INLINE void offer(Lanes<T>& lanes, typename Simd<T>::V value, typename Simd<T>::M index) {
  const auto better = value > lanes.best;
  lanes.second = larger(lanes.second, better ? lanes.best : value);
  lanes.best = better ? value : lanes.best;
  lanes.index = better ? index : lanes.index;
}

template <typename T>
TRIPLET_INLINE typename Simd<T>::M iota() {
  typename Simd<T>::M lane;
  for (int l = 0; l < kWidth<T>; ++l) lane[l] = l;
  return lane;
}

template <typename V, typename M>
TRIPLET_INLINE V permute(V v, M lane) {
#if defined(__clang__)
  V out;
  for (unsigned l = 0; l < sizeof(V) / sizeof(v[0]); ++l) out[l] = v[lane[l]];
  return out;
#else
  return __builtin_shuffle(v, lane);
#endif
}

// The two best values over all lanes, merged into those of row i.
template <typename T>
TRIPLET_INLINE void merge_lanes(Lanes<T> lanes, Top2<T> top, int64_t i) {
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
    const auto partner = iota<T>() ^ Lane<T>(half);
    const auto best = permute(lanes.best, partner);
    lanes.second = larger(larger(lanes.second, permute(lanes.second, partner)), smaller(lanes.best, best));
    lanes.index = best > lanes.best ? permute(lanes.index, partner) : lanes.index;
    lanes.best = larger(lanes.best, best);
  }
  const T best = lanes.best[0], second = lanes.second[0];
  if (best > top.best[i]) {
    top.second[i] = top.best[i] > second ? top.best[i] : second;
    top.best[i] = best;
    top.index[i] = lanes.index[0];
  } else if (best > top.second[i]) {
    top.second[i] = best;
  }
}

template <typename T>
TRIPLET_INLINE void offer_columns(Top2<T> top, int64_t j, int64_t i,
                                  const typename Simd<T>::V (&tile)[kTileRows][kTileVectors]) {
  using M = typename Simd<T>::M;
#pragma GCC unroll 4
  for (int c = 0; c < kTileVectors; ++c) {
    const int64_t at = j + c * kWidth<T>;
    M* index = reinterpret_cast<M*>(top.index + at);
    Lanes<T> lanes{load(top.best + at), load(top.second + at), *index};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) offer<T>(lanes, tile[r][c], M{} + Lane<T>(i + r));
    store(top.best + at, lanes.best);
    store(top.second + at, lanes.second);
    *index = lanes.index;
  }
}

template <typename T>
static void hardest(const Panels<T>& a, const Panels<T>& b, const Lane<T>* self, bool symmetric, Block block,
                    Top2<T> nearest, Top2<T> farthest) {
  using V = typename Simd<T>::V;
  using M = typename Simd<T>::M;
  constexpr int P = kPanel<T>, W = kWidth<T>;
  Lanes<T> near[kTileRows], far[kTileRows];
  Lane<T> first = 0, last = 0;
  bool met_positives = false;
  const V nothing = broadcast(T(kNothing));

  const auto begin = [&](int64_t, int64_t panel) {
    for (int r = 0; r < kTileRows; ++r) near[r] = far[r] = {nothing, nothing, M{}};
    first = a.first[panel];
    last = a.last[panel];
    met_positives = false;
  };
  const auto visit = [&](V(&tile)[kTileRows][kTileVectors], int64_t i, int64_t j, int64_t bp) {
    const bool columns = symmetric && j / P != i / P;
    if (first <= b.last[bp] && b.first[bp] <= last) {
      // Some rows may share a class: separate positives from negatives, element by element.
      met_positives = true;
      V positive[kTileRows][kTileVectors];
      for (int c = 0; c < kTileVectors; ++c) {
        const M column = iota<T>() + Lane<T>(j + c * W);
        const M group = *reinterpret_cast<const M*>(b.group + j + c * W);
        for (int r = 0; r < kTileRows; ++r) {
          const M same = group == a.group[i + r];
          const M other = same & (column != self[i + r]);
          positive[r][c] = other ? -tile[r][c] : nothing;
          tile[r][c] = same ? nothing : tile[r][c];
          offer<T>(far[r], positive[r][c], column);
        }
      }
      if (columns) offer_columns(farthest, j, i, positive);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kTileVectors; ++c) {
      const M column = iota<T>() + Lane<T>(j + c * W);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) offer<T>(near[r], tile[r][c], column);
    }
    if (columns) offer_columns(nearest, j, i, tile);
  };
  const auto end = [&](int64_t i) {
    for (int r = 0; r < kTileRows; ++r) {
      merge_lanes<T>(near[r], nearest, i + r);
      if (met_positives) merge_lanes<T>(far[r], farthest, i + r);
    }
  };
  walk<T>(a.data, a.bias, b, symmetric, block, begin, visit, end);
}

// Measures a reference exactly if it is a candidate. The first time, the best wins; with `ties`, the lowest index
// among those that tie with the best.
template <typename T>
static void consider(Doubtful<T>& row, int64_t j, T value, const Panels<T>& b, const Exact<T>& exact, bool ties) {
  const bool same = b.group[j] == row.group;
  // A row without a class is hidden from the nearest by its bias, but not from the farthest.
  if (b.group[j] == kNoGroup || !((same ? -value : value) >= (same ? row.farthest : row.nearest))) return;
  const int64_t o = exact.order_r[j];
  if (same && o == row.self) return;
  const T *x = exact.x.row(row.anchor), *y = exact.r.row(o);
  const double d = exact.scale_x ? (exact_square(x, y, exact.depth, exact.scale_x[row.anchor], exact.scale_r[o]) +
                                    exact.lack_x[row.anchor] + exact.lack_r[o]) /
                                       2
                                 : exact_square(x, y, exact.depth, 1, 1);
  double& best = same ? row.positive_distance : row.negative_distance;
  int64_t& index = same ? row.positive : row.negative;
  if (ties) {
    if (o < index && (same ? d >= best - kCosineTie : d <= best + kCosineTie)) index = o;
  } else if (index < 0 || (same ? d > best : d < best) || (d == best && o < index)) {
    best = d;
    index = o;
  }
}

template <typename T>
static void settle(const T* panel, const T* bias, const Panels<T>& b, int64_t b_panels, const Exact<T>& exact,
                   Doubtful<T>* doubtful, int count) {
  using V = typename Simd<T>::V;
  using M = typename Simd<T>::M;
  for (int pass = 0; pass < 2; ++pass) {
    const bool ties = pass == 1;
    if (ties && !exact.scale_x) return;  // differences tie exactly, if at all
    const auto visit = [&](V(&tile)[kTileRows][kTileVectors], int64_t i, int64_t j, int64_t) {
      M any{};
      for (int r = 0; r < kTileRows && i + r < count; ++r)
        for (int c = 0; c < kTileVectors; ++c)
          any |= (tile[r][c] >= doubtful[i + r].nearest) | (tile[r][c] <= -doubtful[i + r].farthest);
      Lane<T> found = 0;
      for (int l = 0; l < kWidth<T>; ++l) found |= any[l];
      if (!found) return;
      for (int r = 0; r < kTileRows && i + r < count; ++r)
        for (int c = 0; c < kTileVectors; ++c)
          for (int l = 0; l < kWidth<T>; ++l)
            consider(doubtful[i + r], j + c * kWidth<T> + l, T(tile[r][c][l]), b, exact, ties);
    };
    walk<T>(
        panel, bias, b, false, {0, 1, 0, b_panels}, [](int64_t, int64_t) {}, visit, [](int64_t) {},
        [&](int64_t i, int64_t bp) {
          bool wanted =
              false;  // where only the farthest is in doubt, panels without a row of the class are not looked at
          for (int r = 0; r < kTileRows && i + r < count; ++r) {
            const Doubtful<T>& row = doubtful[i + r];
            wanted |= finite(row.nearest) || (b.first[bp] <= row.group && row.group <= b.last[bp]);
          }
          return wanted;
        });
  }
}

#include "strategies_impl.h"

#include "soft_impl.h"

template <typename T>
static constexpr Kernels<T> make_kernels() {
  return {kPanel<T>,       kTileRows,        inspect<T>,         square<T>,  pack<T>,     hardest<T>,   settle<T>,
          exact_square<T>, row_distances<T>, nearest<T>,         excess<T>,  weigh<T>,    negatives<T>, soft_excess<T>,
          soft_weigh<T>,   pull_anchors<T>,  pull_references<T>, forward<T>, backward<T>, gather<T>};
}

}  // namespace
}  // namespace triplet_ext
