// The strategies' visitors of the tile engine, and the products with the weights that they find. Included by
// kernels_impl.h.

template <typename M>
TRIPLET_INLINE bool any(M mask) {
  const auto wide = (Simd<double>::M)mask;
  int64_t found = 0;
  for (int l = 0; l < kWidth<double>; ++l) found |= wide[l];
  return found != 0;
}

template <typename T>
TRIPLET_INLINE typename Simd<T>::M load_lanes(const Lane<T>* p) {
  typename Simd<T>::M lanes;
  __builtin_memcpy(&lanes, p, sizeof(lanes));
  return lanes;
}

template <typename T>
using Tile = typename Simd<T>::V[kTileRows][kTileVectors];

// Under this part of the rows' squared norms, a squared distance from products has lost too many digits.
constexpr double kSmall = 1.0 / 32;

template <typename T>
TRIPLET_INLINE typename Simd<T>::V root_of(typename Simd<T>::V x) {
  T lanes[kWidth<T>];
  store(lanes, x);
  for (int l = 0; l < kWidth<T>; ++l)
    lanes[l] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(lanes[l]))) : T(__builtin_sqrt(lanes[l]));
  return load(lanes);
}

// y of the tile from differences, where the one from products is not good enough.
template <typename T>
static __attribute__((noinline)) void measure_small(const Pairing<T>& pairing, int64_t i, int64_t bp, Tile<T>& tile) {
  using V = typename Simd<T>::V;
  constexpr int P = kPanel<T>, W = kWidth<T>;
  const Panels<T>&a = pairing.a, &b = pairing.b;
  const T* x = a.data + i / P * P * a.depth + i % P;
  const T* r = b.data + bp * P * b.depth;
  Tile<T> exact = {};
  for (int64_t k = 0; k < b.depth; ++k, x += P, r += P)
    for (int c = 0; c < kTileVectors; ++c) {
      const V column = load(r + c * W);
      for (int row = 0; row < kTileRows; ++row) {
        const V d = x[row] - column;
        exact[row][c] -= d * d;
      }
    }
  for (int c = 0; c < kTileVectors; ++c) {
    const V bias = load(b.bias + bp * P + c * W), lack = b.half_lack ? load(b.half_lack + bp * P + c * W) : V{};
    for (int row = 0; row < kTileRows; ++row) {
      const T own = a.half_lack ? a.half_lack[i + row] : T(0);
      const auto small = tile[row][c] > (bias + a.bias[i + row]) * T(-kSmall);
      tile[row][c] = small ? exact[row][c] / 2 - (lack + own) : tile[row][c];
    }
  }
}

// What walk() gave, made y.
template <typename T>
TRIPLET_INLINE void measure(const Pairing<T>& pairing, int64_t i, int64_t bp, Tile<T>& tile) {
  using V = typename Simd<T>::V;
  typename Simd<T>::M small{};
#pragma GCC unroll 4
  for (int c = 0; c < kTileVectors; ++c) {
    const V bias = load(pairing.b.bias + bp * kPanel<T> + c * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) small |= tile[r][c] > (bias + pairing.a.bias[i + r]) * T(-kSmall);
  }
  if (__builtin_expect(any(small), 0)) measure_small<T>(pairing, i, bp, tile);
  if (!pairing.root) return;
  for (int r = 0; r < kTileRows; ++r)
    for (int c = 0; c < kTileVectors; ++c) tile[r][c] = -root_of<T>(larger(V{}, tile[r][c] * T(-2)));
}

// y of what is no negative becomes NaN, which no comparison holds for. Returns whether there was any.
template <typename T>
TRIPLET_INLINE bool keep_negatives(const Pairing<T>& pairing, int64_t i, int64_t bp, Tile<T>& tile) {
  using M = typename Simd<T>::M;
  constexpr int P = kPanel<T>;
  const Panels<T>&a = pairing.a, &b = pairing.b;
  if (!b.gaps[bp] && !a.gaps[i / P] && (a.first[i / P] > b.last[bp] || b.first[bp] > a.last[i / P])) return false;
  const auto nothing = broadcast(std::numeric_limits<T>::quiet_NaN());
  for (int c = 0; c < kTileVectors; ++c) {
    const M group = *reinterpret_cast<const M*>(b.group + bp * P + c * kWidth<T>);
    for (int r = 0; r < kTileRows; ++r)
      tile[r][c] =
          (group == a.group[i + r]) | (group == kNoGroup) | (a.group[i + r] == kNoGroup) ? nothing : tile[r][c];
  }
  return true;
}

// How many of the thresholds are below y, for each lane.
template <typename T>
TRIPLET_INLINE void count_below(const Thresholds<T>& thresholds, const T* y, Lane<T>* count) {
  Lane<T> step = 1;
  while (step <= thresholds.count) step *= 2;
  for (int l = 0; l < kWidth<T>; ++l) count[l] = 0;
  for (step /= 2; step > 0; step /= 2)
    for (int l = 0; l < kWidth<T>; ++l) {
      const Lane<T> next = count[l] + step;
      const T value = thresholds.values[next - 1];
      count[l] = value < y[l] ? next : count[l];
    }
}

// The sum of t over the thresholds that are below y.
template <typename T>
TRIPLET_INLINE typename Simd<T>::V excess_over(const Thresholds<T>& own, const T* y, const Lane<T>* below) {
  T sum[kWidth<T>];
  for (int l = 0; l < kWidth<T>; ++l)
    sum[l] = below[l] ? (below[l] * (y[l] - own.middle) - own.sums[below[l]]) + below[l] * own.shift : T(0);
  return load(sum);
}

// The sum of a tile's columns.
template <typename T>
TRIPLET_INLINE typename Simd<T>::V across(const typename Simd<T>::V (&columns)[kTileVectors]) {
  auto total = columns[0];
#pragma GCC unroll 4
  for (int c = 1; c < kTileVectors; ++c) total += columns[c];
  return total;
}

template <typename T>
static void row_distances(const Pairing<T>& pairing, int64_t i, int64_t begin, int64_t end, T* y) {
  using V = typename Simd<T>::V;
  constexpr int P = kPanel<T>;
  const int64_t panel = i / P, stride = (end - begin) * P;
  const auto visit = [&](V(&tile)[kTileRows][kTileVectors], int64_t row, int64_t j, int64_t bp) {
    measure<T>(pairing, row, bp, tile);
    for (int r = 0; r < kTileRows; ++r)
      for (int c = 0; c < kTileVectors; ++c) store(y + r * stride + j - begin * P + c * kWidth<T>, tile[r][c]);
  };
  walk<T>(
      pairing.a.data, pairing.a.bias, pairing.b, false, {panel, panel + 1, begin, end}, [](int64_t, int64_t) {}, visit,
      [](int64_t) {}, [i](int64_t row, int64_t) { return row == i; }, pairing.chain);
}

// Walks one panel of anchors that have thresholds: visit(tile, first row within the panel, panel of b, whether there
// are others than negatives), with y of negatives.
template <typename T, typename Begin, typename Visit, typename End, typename Wanted = Always>
TRIPLET_INLINE void walk_negatives(const Pairing<T>& pairing, int64_t panel, int64_t begin_panel, int64_t end_panel,
                                   const Thresholds<T>* thresholds, Begin begin, Visit visit, End end,
                                   Wanted wanted = {}) {
  using V = typename Simd<T>::V;
  const int64_t first = panel * kPanel<T>;
  bool live = false;
  const auto start = [&](int64_t i, int64_t) {
    live = false;
    for (int r = 0; r < kTileRows; ++r) live |= thresholds[i - first + r].count > 0;
    if (live) begin(i - first);
  };
  const auto see = [&](V(&tile)[kTileRows][kTileVectors], int64_t i, int64_t, int64_t bp) {
    measure<T>(pairing, i, bp, tile);
    visit(tile, i - first, bp, keep_negatives<T>(pairing, i, bp, tile));
  };
  const auto stop = [&](int64_t i) {
    if (live) end(i - first);
  };
  const auto want = [&](int64_t i, int64_t bp) { return live && wanted(i - first, bp); };
  walk<T>(pairing.a.data, pairing.a.bias, pairing.b, false, {panel, panel + 1, begin_panel, end_panel}, start, see,
          stop, want, pairing.chain);
}

TRIPLET_INLINE bool marked(Marks marks, int64_t i, int64_t bp) {
  return marks.bits[i / kTileRows * marks.words + bp / 32] >> (bp % 32) & 1;
}

template <typename T>
static void excess(const Pairing<T>& pairing, int64_t panel, int64_t begin_panel, int64_t end_panel,
                   const Thresholds<T>* thresholds, Excess* excess, Marks marks) {
  using V = typename Simd<T>::V;
  using M = typename Simd<T>::M;
  constexpr int W = kWidth<T>, kTiles = 8;  // whose sums are added up in T
  V loss[kTileRows], distance[kTileRows];
  Total<T> whole_loss[kTileRows], whole_distance[kTileRows];
  M active[kTileRows];
  T least[kTileRows];
  int tiles = 0;
  const auto flush = [&] {
    for (int r = 0; r < kTileRows; ++r) {
      add(whole_loss[r], loss[r]);
      add(whole_distance[r], distance[r]);
      loss[r] = distance[r] = V{};
    }
    tiles = 0;
  };
  const auto begin = [&](int64_t i) {
    tiles = 0;
    for (int r = 0; r < kTileRows; ++r) {
      loss[r] = distance[r] = V{};
      whole_loss[r] = whole_distance[r] = Total<T>{};
      active[r] = M{};
      least[r] = thresholds[i + r].count ? thresholds[i + r].values[0] : std::numeric_limits<T>::infinity();
    }
  };
  const auto visit = [&](V(&tile)[kTileRows][kTileVectors], int64_t i, int64_t bp, bool mixed) {
    if (tiles++ == kTiles) flush();
    M some{};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      V own[kTileVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) {
        own[c] = mixed ? (tile[r][c] == tile[r][c] ? tile[r][c] : V{}) : tile[r][c];
        some |= tile[r][c] > least[r];
      }
      distance[r] += across<T>(own);
    }
    if (!any(some)) return;
    marks.bits[i / kTileRows * marks.words + bp / 32] |= uint32_t(1) << (bp % 32);
    for (int r = 0; r < kTileRows; ++r) {
      const Thresholds<T>& own = thresholds[i + r];
      V here[kTileVectors] = {};
      if (own.count > kFewThresholds) {
        for (int c = 0; c < kTileVectors; ++c) {
          if (!any(tile[r][c] > least[r])) continue;
          T y[W];
          Lane<T> below[W];
          store(y, tile[r][c]);
          count_below(own, y, below);
          here[c] = excess_over<T>(own, y, below);
          active[r] += load_lanes<T>(below);
        }
      } else {
        for (Lane<T> p = 0; p < own.count; ++p) {
          const V threshold = broadcast(own.values[p]);
#pragma GCC unroll 4
          for (int c = 0; c < kTileVectors; ++c) {
            if (!own.of) here[c] += larger(tile[r][c] - threshold, V{});
            active[r] -= tile[r][c] > threshold;
          }
        }
        for (Lane<T> p = 0; own.of && p < own.count; ++p)
          for (int c = 0; c < kTileVectors; ++c) here[c] += larger((tile[r][c] - own.of[p]) + own.shift, V{});
      }
      loss[r] += across<T>(here);
    }
  };
  const auto end = [&](int64_t i) {
    flush();
    for (int r = 0; r < kTileRows; ++r) {
      excess[i + r].loss += sum(whole_loss[r]);
      excess[i + r].distance += sum(whole_distance[r]);
      for (int l = 0; l < W; ++l) excess[i + r].active += active[r][l];
    }
  };
  walk_negatives<T>(pairing, panel, begin_panel, end_panel, thresholds, begin, visit, end);
}

// Whether a negative at y may be the one beyond a threshold of an anchor; raises the floors of those it lies beyond.
template <typename T>
static __attribute__((noinline)) bool is_candidate(const Reach<T>& reach, int64_t anchor, T y,
                                                   const RoundingBound& bound) {
  const T *values = reach.values + anchor, *certain = reach.certain + anchor;
  T* floor = reach.floor + anchor;
  const int64_t farthest = reach.slots * reach.stride;
  const double error = rounding_error(bound, reach.norm[anchor], 2 * __builtin_fabs(double(y)));
  bool wanted = -y >= floor[farthest];
  if (wanted && T(-y - error) > floor[farthest]) floor[farthest] = T(-y - error);
  for (int64_t at = 0; at < farthest; at += reach.stride) {
    if (!(y < values[at] && y >= floor[at])) continue;
    wanted = true;
    if (y < certain[at] && T(y - error) > floor[at]) floor[at] = T(y - error);
  }
  return wanted;
}

template <typename T>
static void nearest(const Pairing<T>& pairing, bool symmetric, Block block, const Reach<T>& reach,
                    const RoundingBound& bound, Candidates<T>& candidates) {
  using V = typename Simd<T>::V;
  using M = typename Simd<T>::M;
  constexpr int P = kPanel<T>, W = kWidth<T>;
  const auto add = [&](const M& mask, V y, int64_t anchor, int64_t reference, bool column) {
    T values[W];
    store(values, y);
    for (int l = 0; l < W; ++l) {
      const int64_t own = anchor + (column ? l : 0), other = reference + (column ? 0 : l);
      if (mask[l] && is_candidate(reach, own, values[l], bound))
        candidates.data[candidates.count++] = {Lane<T>(own), Lane<T>(other), values[l]};
    }
  };
  const auto visit = [&](V(&tile)[kTileRows][kTileVectors], int64_t i, int64_t j, int64_t bp) {
    measure<T>(pairing, i, bp, tile);
    keep_negatives<T>(pairing, i, bp, tile);
    // Almost nothing is a candidate, once the nearest and the farthest are about known.
    const bool rows = reach.live[i / P], columns = symmetric && i / P != bp && reach.live[bp];
    const int64_t farthest = reach.slots * reach.stride;
    M in_row[kTileRows][kTileVectors], in_column[kTileRows][kTileVectors], some{};
    for (int r = 0; r < kTileRows; ++r) {
      M here[kTileVectors] = {};
      const T far = -reach.floor[farthest + i + r];
#pragma GCC unroll 4
      for (int c = 0; rows && c < kTileVectors; ++c) here[c] = tile[r][c] <= far;
      for (int64_t at = 0; rows && at < farthest; at += reach.stride) {
        const T value = reach.values[at + i + r], floor = reach.floor[at + i + r];
#pragma GCC unroll 4
        for (int c = 0; c < kTileVectors; ++c) here[c] |= (tile[r][c] < value) & (tile[r][c] >= floor);
      }
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) some |= in_row[r][c] = here[c];
    }
    for (int c = 0; columns && c < kTileVectors; ++c) {
      const int64_t column = j + c * W;
      M here[kTileRows];
      const V far = -load(reach.floor + farthest + column);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) here[r] = tile[r][c] <= far;
      for (int64_t at = 0; at < farthest; at += reach.stride) {
        const V value = load(reach.values + at + column), floor = load(reach.floor + at + column);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) here[r] |= (tile[r][c] < value) & (tile[r][c] >= floor);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) some |= in_column[r][c] = here[r];
    }
    if (!any(some)) return;
    if (candidates.room - candidates.count < 2 * kTileRows * P) candidates.make_room(candidates);
    for (int r = 0; r < kTileRows; ++r)
      for (int c = 0; c < kTileVectors; ++c) {
        if (any(in_row[r][c])) add(in_row[r][c], tile[r][c], i + r, j + c * W, false);
        if (columns && any(in_column[r][c])) add(in_column[r][c], tile[r][c], j + c * W, i + r, true);
      }
  };
  walk<T>(
      pairing.a.data, pairing.a.bias, pairing.b, symmetric, block, [](int64_t, int64_t) {}, visit, [](int64_t) {},
      [&](int64_t i, int64_t bp) { return reach.live[i / P] || (symmetric && reach.live[bp]); }, pairing.chain);
}

// The weights of y of one anchor and of some columns of a panel from those of the distances: what is multiplied with
// rows. Puts pairs that are close aside.
template <typename T>
TRIPLET_INLINE typename Simd<T>::V weights_of(const Pairing<T>& pairing, int64_t i, int64_t j, typename Simd<T>::V y,
                                              typename Simd<T>::V w, Pairs<T>* close) {
  if (!pairing.root) return w;
  auto near = (y * y < (load(pairing.b.bias + j) + pairing.a.bias[i]) * T(2 * kClose)) & (w != 0);
  if (__builtin_expect(any(near), 0)) {
    near &= load_lanes<T>(close->equal_b + j) != close->equal_a[i];
    for (int l = 0; any(near) && l < kWidth<T>; ++l) {
      if (!near[l] || close->count == close->room) continue;
      close->data[close->count++] = {i, j + l, w[l]};
      w[l] = 0;
    }
  }
  return y < 0 ? w / -y : w * T(0);  // -y, whose derivative at 0 is 0
}

template <typename T>
static void weigh(const Pairing<T>& pairing, int64_t panel, int64_t begin_panel, int64_t end_panel,
                  const Thresholds<T>* thresholds, const T* weight, double* const* pulls, Marks marks,
                  Weights<T> weights, Pairs<T>* close) {
  using V = typename Simd<T>::V;
  using M = typename Simd<T>::M;
  constexpr int P = kPanel<T>, W = kWidth<T>;
  M active[kTileRows][kFewThresholds];
  const auto begin = [&](int64_t) {
    for (int r = 0; r < kTileRows; ++r)
      for (int p = 0; p < kFewThresholds; ++p) active[r][p] = M{};
  };
  const auto visit = [&](V(&tile)[kTileRows][kTileVectors], int64_t i, int64_t bp, bool) {
    T* out = weights.tiles + (i / kTileRows * weights.panels + bp) * kTileRows * P;
    for (int r = 0; r < kTileRows; ++r) {
      const Thresholds<T>& own = thresholds[i + r];
      V count[kTileVectors] = {};
      if (own.count <= kFewThresholds) {
        for (Lane<T> p = 0; p < own.count; ++p) {
          const V threshold = broadcast(own.values[p]);
#pragma GCC unroll 4
          for (int c = 0; c < kTileVectors; ++c) {
            const M above = tile[r][c] > threshold;
            active[r][p] -= above;
            count[c] += above ? broadcast(T(1)) : V{};
          }
        }
      } else {
        for (int c = 0; c < kTileVectors; ++c) {
          if (!any(tile[r][c] > own.values[0])) continue;
          T y[W];
          Lane<T> below[W];
          store(y, tile[r][c]);
          count_below(own, y, below);
          count[c] = __builtin_convertvector(load_lanes<T>(below), V);
          for (int l = 0; l < W; ++l)
            if (below[l]) pulls[i + r][below[l] - 1] += 1;  // of the thresholds up to this one; summed up at the end
        }
      }
      for (int c = 0; c < kTileVectors; ++c)
        store(out + r * P + c * W,
              weights_of<T>(pairing, panel * P + i + r, bp * P + c * W, tile[r][c], -count[c] * weight[i + r], close));
    }
  };
  const auto end = [&](int64_t i) {
    for (int r = 0; r < kTileRows; ++r) {
      const Lane<T> few = thresholds[i + r].count <= kFewThresholds ? thresholds[i + r].count : 0;
      for (Lane<T> p = 0; p < few; ++p)
        for (int l = 0; l < W; ++l) pulls[i + r][p] += active[r][p][l];
    }
  };
  walk_negatives<T>(pairing, panel, begin_panel, end_panel, thresholds, begin, visit, end,
                    [marks](int64_t i, int64_t bp) { return marked(marks, i, bp); });
}

// acc[r][...] -= w[r * row_step + t * step] * rows[t * width ...], for each t.
template <typename T>
TRIPLET_INLINE void subtract(Tile<T>& acc, const T* w, int64_t row_step, int64_t step, int64_t terms, const T* rows,
                             int64_t width) {
  for (int64_t t = 0; t < terms; ++t) {
    typename Simd<T>::V column[kTileVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kTileVectors; ++c) column[c] = load(rows + t * width + c * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) acc[r][c] -= w[r * row_step + t * step] * column[c];
  }
}

// Adds to `out` what add_piece(acc) adds to an accumulator, until it returns false. Each piece is a sum of its own,
// since long chains of equal terms round one way.
template <typename T, typename F>
TRIPLET_INLINE void update(T* out, int64_t width, F add_piece) {
  using V = typename Simd<T>::V;
  Tile<T> whole = {};
  for (bool more = true; more;) {
    Tile<T> acc;
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) acc[r][c] = V{};
    more = add_piece(acc);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) whole[r][c] += acc[r][c];
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int c = 0; c < kTileVectors; ++c) {
      T* to = out + r * width + c * kWidth<T>;
      store(to, load(to) + whole[r][c]);
    }
}
template <typename T>
static void pull_anchors(Weights<T> weights, Marks marks, int64_t begin, int64_t end, const T* rows, int64_t width,
                         T* out, double* sums) {
  constexpr int P = kPanel<T>, W = kWidth<T>;
  bool some = false;
  for (int64_t bp = begin; bp < end; ++bp) {
    if (!marked(marks, 0, bp)) continue;
    some = true;
    for (int r = 0; r < kTileRows; ++r) {
      auto total = load(weights.tiles + (bp * kTileRows + r) * P);
      for (int c = 1; c < kTileVectors; ++c) total += load(weights.tiles + (bp * kTileRows + r) * P + c * W);
      sums[r] += sum<T>(total);
    }
  }
  for (int64_t k = 0; some && k < width; k += P) {
    int64_t bp = begin;
    update<T>(out + k, width, [&](Tile<T>& acc) {
      for (int terms = 0; bp < end && terms < kPieceTerms; ++bp) {
        if (!marked(marks, 0, bp)) continue;
        subtract<T>(acc, weights.tiles + bp * kTileRows * P, P, 1, P, rows + bp * P * width + k, width);
        terms += P;
      }
      return bp < end;
    });
  }
}

template <typename T>
static void pull_references(Weights<T> weights, Marks marks, int64_t groups, int64_t panel, const T* rows,
                            int64_t width, T* out, double* sums) {
  constexpr int P = kPanel<T>, W = kWidth<T>;
  const auto tile_of = [&](int64_t g) { return weights.tiles + (g * weights.panels + panel) * kTileRows * P; };
  bool some = false;
  for (int64_t g = 0; g < groups; ++g) {
    if (!marked(marks, g * kTileRows, panel)) continue;
    some = true;
    for (int c = 0; c < kTileVectors; ++c) {
      auto total = load(tile_of(g) + c * W);
      for (int r = 1; r < kTileRows; ++r) total += load(tile_of(g) + r * P + c * W);
      T lanes[W];
      store(lanes, total);
      for (int l = 0; l < W; ++l) sums[c * W + l] += lanes[l];
    }
  }
  if (!some) return;
  for (int64_t j = 0; j < P; j += kTileRows)
    for (int64_t k = 0; k < width; k += P) {
      int64_t g = 0;
      update<T>(out + j * width + k, width, [&](Tile<T>& acc) {
        for (int terms = 0; g < groups && terms < kPieceTerms; ++g) {
          if (!marked(marks, g * kTileRows, panel)) continue;
          subtract<T>(acc, tile_of(g) + j, 1, P, kTileRows, rows + g * kTileRows * width + k, width);
          terms += kTileRows;
        }
        return g < groups;
      });
    }
}
