// The soft margin where every negative is taken: log(1 + exp(t)) and its slope 1 / (1 + exp(-t)), summed over all pairs
// of a negative and a threshold of one anchor, in three ways to make that cheap.
//
//   - exp(t) of a pair is a product of one exp of the negative and one of the threshold, and the logarithms of several
//     thresholds are one of a product.
//   - Both functions are analytic, with the nearest pole pi away. Where many negatives lie in an interval of length 1,
//     sums over them are sums over its few Chebyshev points, with weights that interpolation gives.
//   - Thresholds far below a negative add t and a slope of 1, and those far above nothing.
//
// Included by kernels_impl.h, after strategies_impl.h.

// exp(x) for x <= 0.
template <typename T>
TRIPLET_INLINE typename Simd<T>::V exp_of(typename Simd<T>::V x) {
  using V = typename Simd<T>::V;
  using M = typename Simd<T>::M;
  constexpr bool kSingle = sizeof(T) == 4;
  constexpr int kTerms = kSingle ? 7 : 13, kMantissa = kSingle ? 23 : 52, kBias = kSingle ? 127 : 1023;
  // ln 2 in two parts, the first with few enough bits to be multiplied exactly.
  constexpr T kHigh = kSingle ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T kLow = kSingle ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
  x = larger(x, broadcast(T(kSingle ? -104 : -746)));                              // what is below is 0 in T
  const M n = __builtin_convertvector(x * T(1.44269504088896340736) - T(0.5), M);  // towards 0: to the nearest
  const V whole = __builtin_convertvector(n, V), rest = x - whole * kHigh - whole * kLow;
  V value = broadcast(T(1));
  for (int k = kTerms; k > 0; --k) value = 1 + value * rest * (T(1) / T(k));
  // 2^n in two steps: it may be subnormal.
  const M half = n / 2, other = n - half;
  const M high = (half + Lane<T>(kBias)) << kMantissa, low = (other + Lane<T>(kBias)) << kMantissa;
  return value * (V)high * (V)low;
}

// log(1 + u) for u >= 0.
template <typename T>
TRIPLET_INLINE typename Simd<T>::V log1p_of(typename Simd<T>::V u) {
  using V = typename Simd<T>::V;
  using M = typename Simd<T>::M;
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  constexpr Lane<T> kOne = Lane<T>(kBias) << kMantissa;
  // 1 + u = 2^n (1 + e); of a small u, e is u, with all its digits.
  const M bits = (M)(V)(1 + u), n = (bits >> kMantissa) - kBias;
  const V part = (V)((bits & ((Lane<T>(1) << kMantissa) - 1)) | kOne), e = n > 0 ? part - 1 : u;
  // The series of artanh.
  const V s = e / (2 + e), square = s * s;
  V value = broadcast(T(0));
  for (int k = sizeof(T) == 4 ? 7 : 16; k >= 0; --k) value = value * square + T(1) / T(2 * k + 1);
  return __builtin_convertvector(n, V) * T(0.693147180559945309417) + 2 * s * value;
}

constexpr int kGroup = 16;        // thresholds whose logarithms are taken at once
constexpr int kSpread = 8;        // how far they may be apart: their exps are to stay far from 0 and infinity
constexpr int kUnroll = 4;        // vectors at a time, that do not wait for each other
constexpr int kIntervals = 2048;  // at most
template <typename T>
constexpr int kStep = kUnroll * kWidth<T>;
static_assert(kSoftStep % kStep<float> == 0 && kSoftStep % kStep<double> == 0, "rooms hold whole steps");
template <typename T>
constexpr int kPoints = sizeof(T) == 4 ? 8 : 14;  // of an interval: the error is 1e-9, 1e-16
// From this t on, log(1 + exp(t)) is t, and the slope 1.
template <typename T>
constexpr T kLinear = sizeof(T) == 4 ? T(18) : T(37);
// How much less t is where exp(t) adds nothing.
template <typename T>
constexpr T kNegligible = sizeof(T) == 4 ? T(30) : T(50);
// From this t down, exp(t) is 0 in T.
template <typename T>
constexpr T kVanish = sizeof(T) == 4 ? T(-103.9) : T(-745.1);
template <typename T>
constexpr T kNowhere = T(-1e30);  // in the place of what is no negative: so far that it adds nothing

template <typename T>
TRIPLET_INLINE int64_t padded(int64_t count) {
  return (count + kStep<T> - 1) / kStep<T> * kStep<T>;
}

template <typename T, typename F>
TRIPLET_INLINE T over_lanes(typename Simd<T>::V v, F better) {
  T lanes[kWidth<T>];
  store(lanes, v);
  for (int l = 1; l < kWidth<T>; ++l) lanes[0] = better(lanes[l], lanes[0]) ? lanes[l] : lanes[0];
  return lanes[0];
}

// --- sums over all pairs of some points and the thresholds

// Divides the thresholds into groups: room.start[g] is the first of group g, room.up and room.down exp of how far
// thresholds are above the first of their group, and its inverse. Returns the number of groups.
template <typename T>
static int group_thresholds(const Thresholds<T>& own, const SoftRoom<T>& room) {
  constexpr int W = kWidth<T>;
  int groups = 0;
  Lane<T> begin = 0;
  for (Lane<T> p = 0; p < own.count; ++p) {
    if (p == 0 || p - begin == kGroup || own.values[p] - own.values[begin] > kSpread) {
      begin = p;
      room.start[groups++] = int32_t(p);
    }
    room.up[p] = own.values[begin] - own.values[p];
  }
  room.start[groups] = int32_t(own.count);
  for (Lane<T> p = 0; p < own.count; p += W) {  // what is beyond the last is in the room, too
    const auto down = exp_of<T>(smaller(load(room.up + p), typename Simd<T>::V{}));
    store(room.down + p, down);
    store(room.up + p, 1 / down);
  }
  return groups;
}

// Which groups matter for points of a step: to those before `begin`, they are linear; those from `end` on they ignore.
struct Near {
  int begin, end;
};

template <typename T>
static Near near_groups(const T* point, const Thresholds<T>& own, const int32_t* start, int groups) {
  if (groups == 1) return {0, 1};
  auto low = load(point), high = low;
  for (int u = 1; u < kUnroll; ++u) {
    low = smaller(low, load(point + u * kWidth<T>));
    high = larger(high, load(point + u * kWidth<T>));
  }
  const T least = over_lanes<T>(low, [](T a, T b) { return a < b; });
  const T most = over_lanes<T>(high, [](T a, T b) { return a > b; });
  const T best = least - own.values[0], reach = most + kNegligible<T> - (best < 0 ? best : T(0));
  // By halves: how many groups end far below, and how many begin within reach.
  const auto count = [groups](auto below) {
    int found = 0, left = groups;
    while (left > 0) {
      const int half = left / 2;
      if (below(found + half)) found += half + 1, left -= half + 1;
      else left = half;
    }
    return found;
  };
  const int begin = count([&](int g) { return own.values[start[g + 1] - 1] < least - kLinear<T>; });
  const int end = count([&](int g) { return own.values[start[g]] <= reach; });
  return {begin, end > begin ? end : begin};
}

// exp(point - first) and its inverse, of which either may be 0 and the other infinite.
template <typename T>
TRIPLET_INLINE void exps_of(typename Simd<T>::V point, T first, typename Simd<T>::V& up, typename Simd<T>::V& down) {
  const auto away = point - first, exp = exp_of<T>(away > 0 ? -away : away), inverse = 1 / exp;
  up = away > 0 ? inverse : exp;
  down = away > 0 ? exp : inverse;
}

// Of log(1 + exp(t)), times the points' weights. `count` points: whole steps.
template <typename T>
static double soft_loss(const SoftRoom<T>& room, int64_t count, const Thresholds<T>& own) {
  using V = typename Simd<T>::V;
  constexpr int W = kWidth<T>;
  const int groups = group_thresholds(own, room);
  Total<T> total{};
  for (int64_t from = 0; from < count; from += kStep<T>) {
    V few{};
    // log(1 + exp(t)) = max(0, t) + log(1 + exp(-|t|)).
    for (int64_t k = from; k < from + kStep<T>; k += W) {
      const V point = load(room.point + k);
      V over{};
      if (own.count <= kFewThresholds) {
        for (Lane<T> p = 0; p < own.count; ++p) over += larger(point - own.values[p], V{});
      } else {
        Lane<T> below[W];
        count_below(own, room.point + k, below);
        over = excess_over<T>(own, room.point + k, below);
      }
      few += over * load(room.weight + k);
    }
    add(total, few);
    const Near near = near_groups(room.point + from, own, room.start, groups);
    V logs[kUnroll] = {};
    for (int g = near.begin; g < near.end; ++g) {
      V up[kUnroll], down[kUnroll], product[kUnroll] = {};  // less 1
      for (int u = 0; u < kUnroll; ++u)
        exps_of<T>(load(room.point + from + u * W), own.values[room.start[g]], up[u], down[u]);
      for (int32_t p = room.start[g]; p < room.start[g + 1]; ++p)
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u)
          product[u] += smaller(up[u] * room.down[p], down[u] * room.up[p]) * (1 + product[u]);
      for (int u = 0; u < kUnroll; ++u) logs[u] += log1p_of<T>(product[u]);
      if (g % kGroup && g + 1 < near.end) continue;
      few = V{};
      for (int u = 0; u < kUnroll; ++u) {
        few += logs[u] * load(room.weight + from + u * W);
        logs[u] = V{};
      }
      add(total, few);
    }
  }
  return sum(total);
}

// Of the slopes: over thresholds, of each point, to room.sums; and over points, times their weights, added to `pulls`
// of each threshold.
template <typename T>
static void soft_slopes(const SoftRoom<T>& room, int64_t count, const Thresholds<T>& own, double* pulls) {
  using V = typename Simd<T>::V;
  constexpr int W = kWidth<T>;
  const int groups = group_thresholds(own, room);
  for (int g = 0; g < groups; ++g) room.linear[g] = 0;
  for (int64_t from = 0; from < count; from += kStep<T>) {
    const Near near = near_groups(room.point + from, own, room.start, groups);
    if (near.begin > 0)  // for all groups up to this one
      for (int64_t k = from; k < from + kStep<T>; ++k) room.linear[near.begin - 1] += room.weight[k];
    for (int64_t k = from; k < from + kStep<T>; ++k) room.sums[k] = room.start[near.begin];
    for (int g = near.begin; g < near.end; ++g) {
      V up, down[kUnroll], of_point[kUnroll] = {};
      for (int u = 0; u < kUnroll; ++u)
        exps_of<T>(load(room.point + from + u * W), own.values[room.start[g]], up, down[u]);
      for (int32_t p = room.start[g]; p < room.start[g + 1]; ++p) {
        V of_threshold{};
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) {
          const V slope = 1 / (1 + down[u] * room.up[p]);
          of_point[u] += slope;
          of_threshold += slope * load(room.weight + from + u * W);
        }
        pulls[p] += sum<T>(of_threshold);
      }
      for (int u = 0; u < kUnroll; ++u) {
        T lanes[W];
        store(lanes, of_point[u]);
        for (int l = 0; l < W; ++l) room.sums[from + u * W + l] += lanes[l];
      }
    }
  }
  double linear = 0;
  for (int g = groups; g-- > 0;) {
    linear += room.linear[g];
    for (int32_t p = room.start[g]; p < room.start[g + 1]; ++p) pulls[p] += linear;
  }
}

// --- the points

// Chebyshev's points in [-1, 1], and his polynomials at these.
template <typename T>
struct Chebyshev {
  static constexpr int N = kPoints<T>;
  double point[N], polynomial[N][N];  // [degree][point]
  Chebyshev() {
    for (int k = 0; k < N; ++k) {
      point[k] = __builtin_cos(3.14159265358979323846 * (k + 0.5) / N);
      for (int j = 0; j < N; ++j) polynomial[j][k] = __builtin_cos(3.14159265358979323846 * j * (k + 0.5) / N);
    }
  }
};

// A row of negatives, in units of t: NaN, and what is too near zero to be seen, far away.
template <typename T>
struct SoftRow {
  int64_t count;      // of room.z
  int64_t real;       // negatives among them
  int64_t points;     // what stands for it: whole steps
  int64_t intervals;  // among these
  T lowest;           // of all negatives, and of those that are seen
  T first, highest;   // of those that are seen
  double distance;    // the sum of y
};

template <typename T>
static SoftRow<T> soft_row(const SoftThresholds<T>& own, const T* y, int64_t count, const SoftRoom<T>& room) {
  using V = typename Simd<T>::V;
  constexpr int W = kWidth<T>, kVectors = 8;  // whose sums are added up in T
  const T least = own.thresholds.values[0] + kVanish<T>;
  V low = broadcast(-kNowhere<T>), high = broadcast(kNowhere<T>);
  typename Simd<T>::M there{};
  Total<T> total{};
  for (int64_t from = 0; from < count; from += kVectors * W) {
    V few{};
    for (int64_t k = from; k < count && k < from + kVectors * W; k += W) {
      const V of = load(y + k), z = (of - own.middle) * own.unit[0] * own.unit[1];
      const auto real = of == of;
      const V seen = real & (z >= least) ? z : broadcast(kNowhere<T>);
      there -= real;
      few += real ? of : V{};
      low = smaller(low, real ? z : low);
      high = larger(high, seen);
      store(room.z + k, seen);
    }
    add(total, few);
  }
  SoftRow<T> row{count, 0, 0, 0, T(0), T(0), T(0), sum(total)};
  for (int l = 0; l < W; ++l) row.real += there[l];
  row.lowest = over_lanes<T>(low, [](T a, T b) { return a < b; });
  row.first = row.lowest > least ? row.lowest : least;
  row.highest = over_lanes<T>(high, [](T a, T b) { return a > b; });
  return row;
}

// From -1 to 1 within its interval.
template <typename T>
TRIPLET_INLINE double within(const SoftRow<T>& row, T z) {
  const T along = z - row.first;
  return 2 * double(along - T(int32_t(along))) - 1;
}

constexpr int32_t kNoPlace = std::numeric_limits<int32_t>::min();

// Chooses the points: Chebyshev's of an interval where many negatives are, or else the negatives themselves, side by
// side. room.place says where each of them is: its point, or ~ the first of its interval; nullptr: all where they were.
template <typename T>
static void choose_points(SoftRow<T>& row, const Thresholds<T>& own, SoftRoom<T>& room) {
  constexpr int N = kPoints<T>;
  int64_t points = 0;
  if (own.count <= kFewThresholds || !(row.highest >= row.first)) {
    room.point = room.z;
    room.place = nullptr;
    for (int64_t k = 0; k < row.count; ++k) room.weight[k] = 1;
    points = row.count;
  } else {
    const T range = row.highest - row.first;
    const bool short_enough = range < kIntervals - 1;
    const T scale = short_enough ? T(1) : T(kIntervals - 1) / range;
    int32_t start[kIntervals] = {};
    for (int64_t k = 0; k < row.count; ++k) {
      const T along = (room.z[k] - row.first) * scale;
      room.place[k] = along >= 0 ? int32_t(along) : kNoPlace;
      if (along >= 0) ++start[room.place[k]];
    }
    for (int32_t& interval : start) {
      const int64_t there = interval;
      // What an interval saves in pairs, and what it costs each negative.
      const bool worth_it = short_enough && (there - N) * own.count > 64 * there;
      interval = int32_t(worth_it ? ~points : points);
      points += worth_it ? N : there;
    }
    double* moments = room.sums;  // of the polynomials, over an interval's negatives
    for (int64_t k = 0; k < points; ++k) moments[k] = 0;
    for (int64_t k = 0; k < row.count; ++k) {
      if (room.place[k] == kNoPlace) continue;
      int32_t& interval = start[room.place[k]];
      if (interval >= 0) {
        room.point[interval] = room.z[k];
        room.weight[interval] = 1;
        room.place[k] = interval++;
        continue;
      }
      double *to = moments + ~interval, last = 1, next = within(row, room.z[k]);
      const double x = next;
      for (int j = 0; j < N; ++j) {
        to[j] += last;
        const double after = 2 * x * next - last;
        last = next;
        next = after;
      }
      room.place[k] = interval;
    }
    // The polynomial through values f of the points is the sum over k and degrees j of polynomial[j][k] f[k] times the
    // polynomial of degree j, times 2 / N but for j = 0: 1 / N.
    const Chebyshev<T> chebyshev;
    for (int i = 0; i < kIntervals; ++i) {
      if (start[i] >= 0) continue;
      room.interval[row.intervals++] = ~start[i];
      const double* of = moments + ~start[i];
      for (int k = 0; k < N; ++k) {
        double weight = of[0] / 2;
        for (int j = 1; j < N; ++j) weight += of[j] * chebyshev.polynomial[j][k];
        room.weight[~start[i] + k] = T(weight * 2 / N);
        room.point[~start[i] + k] = T(row.first + i + (chebyshev.point[k] + 1) / 2);
      }
    }
  }
  row.points = padded<T>(points);
  for (int64_t k = points; k < row.points; ++k) {
    room.point[k] = points ? room.point[points - 1] : T(0);
    room.weight[k] = 0;
  }
}

// From the sums at the points those at z, in the place of z.
template <typename T>
static void interpolate(const SoftRow<T>& row, const SoftRoom<T>& room) {
  constexpr int N = kPoints<T>;
  const Chebyshev<T> chebyshev;
  for (int64_t i = 0; i < row.intervals; ++i) {
    double* of = room.sums + room.interval[i];
    double factor[N];
    for (int j = 0; j < N; ++j) {
      factor[j] = 0;
      for (int k = 0; k < N; ++k) factor[j] += of[k] * chebyshev.polynomial[j][k];
    }
    for (int j = 0; j < N; ++j) of[j] = factor[j] * (j ? 2.0 : 1.0) / N;
  }
  for (int64_t k = 0; k < row.count; ++k) {
    const int32_t place = room.place ? room.place[k] : int32_t(k);
    if (place >= 0 || place == kNoPlace) {
      room.z[k] = place >= 0 ? T(room.sums[place]) : T(0);
      continue;
    }
    // Clenshaw's sum of the polynomials.
    const double *of = room.sums + ~place, x = within(row, room.z[k]);
    double next = 0, after = 0;
    for (int j = N - 1; j > 0; --j) {
      const double here = of[j] + 2 * x * next - after;
      after = next;
      next = here;
    }
    room.z[k] = T(of[0] + x * next - after);
  }
}

// --- the kernels

template <typename T>
static void negatives(const Pairing<T>& pairing, int64_t panel, int64_t begin_panel, int64_t end_panel,
                      const Thresholds<T>* thresholds, Marks marks, T* y, int64_t stride) {
  using V = typename Simd<T>::V;
  constexpr int P = kPanel<T>, W = kWidth<T>;
  const V nothing = broadcast(std::numeric_limits<T>::quiet_NaN());
  const auto visit = [&](V(&tile)[kTileRows][kTileVectors], int64_t i, int64_t bp, bool) {
    for (int r = 0; r < kTileRows; ++r)
      for (int c = 0; c < kTileVectors; ++c) store(y + (i + r) * stride + (bp - begin_panel) * P + c * W, tile[r][c]);
  };
  const auto wanted = [&](int64_t i, int64_t bp) {
    if (!marks.bits || marked(marks, i, bp)) return true;
    for (int r = 0; r < kTileRows; ++r)
      for (int c = 0; c < kTileVectors; ++c) store(y + (i + r) * stride + (bp - begin_panel) * P + c * W, nothing);
    return false;
  };
  walk_negatives<T>(pairing, panel, begin_panel, end_panel, thresholds, [](int64_t) {}, visit, [](int64_t) {}, wanted);
}

template <typename T>
static void soft_excess(const SoftThresholds<T>& own, int64_t row, int64_t begin_panel, int64_t end_panel, const T* y,
                        SoftRoom<T> room, Excess* excess, Marks marks) {
  constexpr int P = kPanel<T>, W = kWidth<T>;
  const int64_t count = (end_panel - begin_panel) * P;
  SoftRow<T> soft = soft_row(own, y, count, room);
  excess->distance += soft.distance;
  const Lane<T> thresholds = own.thresholds.count;
  for (int64_t k = 0; k < count; k += W) {
    const auto z = load(room.z + k);
    if (!any(z > kNowhere<T>)) continue;
    const int64_t bp = begin_panel + k / P;
    marks.bits[row / kTileRows * marks.words + bp / 32] |= uint32_t(1) << (bp % 32);
    if (soft.lowest - kVanish<T> > own.thresholds.values[thresholds - 1]) continue;  // all are active
    T reach[W];
    Lane<T> below[W];
    store(reach, z - kVanish<T>);
    count_below(own.thresholds, reach, below);
    for (int l = 0; l < W; ++l) excess->active += below[l];
  }
  if (soft.lowest - kVanish<T> > own.thresholds.values[thresholds - 1]) excess->active += soft.real * thresholds;
  choose_points(soft, own.thresholds, room);
  excess->loss += soft_loss<T>(room, soft.points, own.thresholds);
}

template <typename T>
static void soft_weigh(const Pairing<T>& pairing, const SoftThresholds<T>& own, int64_t i, int64_t begin_panel,
                       int64_t end_panel, const T* y, SoftRoom<T> room, T weight, double* pulls, Marks marks,
                       Weights<T> weights, Pairs<T>* close) {
  constexpr int P = kPanel<T>, W = kWidth<T>;
  SoftRow<T> row = soft_row(own, y, (end_panel - begin_panel) * P, room);
  choose_points(row, own.thresholds, room);
  soft_slopes<T>(room, row.points, own.thresholds, pulls);
  interpolate(row, room);
  const int64_t within = i % P;
  T* out = weights.tiles + (within / kTileRows * weights.panels * kTileRows + within % kTileRows) * P;
  for (int64_t bp = begin_panel; bp < end_panel; ++bp) {
    if (!marked(marks, within, bp)) continue;
    for (int c = 0; c < kTileVectors; ++c) {
      const int64_t k = (bp - begin_panel) * P + c * W;
      store(out + bp * kTileRows * P + c * W,
            weights_of<T>(pairing, i, bp * P + c * W, load(y + k), load(room.z + k) * -weight, close));
    }
  }
}
