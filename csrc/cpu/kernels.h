// What the operators need done fast: the interface between the operators (ATen, threads, memory) and the
// kernels (plain loops over pointers, compiled once for each instruction set).
#pragma once

#include "../triplet.h"

namespace triplet_ext {

// Rows of a matrix; `stride` elements from one to the next, the elements of a row adjacent.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// An index or a class beside a value: of the value's width, so that both fill vectors of one length.
template <typename T>
struct LaneOf;
template <>
struct LaneOf<float> {
  using type = int32_t;
};
template <>
struct LaneOf<double> {
  using type = int64_t;
};
template <typename T>
using Lane = typename LaneOf<T>::type;

// Rows packed for the tile engine: panel after panel, each [depth, panel] (the rows of a panel are adjacent
// for one feature), centred, sorted by class. Rows that pad the last panel, and rows that are not finite, are
// zero with a bias so large that they are nobody's nearest, and have no class.
template <typename T>
struct Panels {
  const T* data;         // [panels, depth, panel]
  const T* bias;         // [panels * panel]: half the squared norm
  const T* half_lack;    // [panels * panel]: the part of the bias that is no square; nullptr: none
  const Lane<T>* group;  // [panels * panel]: class, ascending; kNoGroup
  const Lane<T>* first;  // [panels]: the lowest class of a panel
  const Lane<T>* last;   // [panels]: the highest
  const uint8_t* gaps;   // [panels]: whether some of its rows have no class
  int64_t depth;
};
constexpr int kNoGroup = -1;
// Features whose products are added up in one chain; and where rounding is to leave less in doubt, for some time more.
constexpr int kChain = 128, kFineChain = 32;

// The best value of each row, the second best, and where the best is. Values are -d/2 for the nearest and d/2
// for the farthest, so that in both cases the largest wins. Ties need no rule: where best and second are too
// close to tell, the row is looked at again, exactly.
template <typename T>
struct Top2 {
  T* best;
  T* second;
  Lane<T>* index;  // of a packed row
};
// Below every value, and what a bias hides with: the data is scaled to |x| <= 1, so that both are out of reach.
constexpr double kNothing = -1e36;
constexpr double kHidden = 1e30;

// A block of panels of a against a block of panels of b.
struct Block {
  int64_t a_begin, a_end, b_begin, b_end;
};

// What it takes to look again: rows of the original matrix, in float64.
template <typename T>
struct Exact {
  Rows<T> x, r;  // anchors and references
  int64_t depth;
  const double* scale_x;  // [B], [R]: 1 / norm, of the cosine distance; else nullptr
  const double* scale_r;
  const double* lack_x;  // what the squared norm of a scaled row lacks to 1; likewise
  const double* lack_r;
  const int64_t* order_r;  // original index of a packed reference
};

// The cosine distance has roots and quotients in it: what rounding can't tell apart is a tie.
constexpr double kCosineTie = 0x1p-48;

// One anchor that is looked at again.
template <typename T>
struct Doubtful {
  int64_t anchor;  // original index
  Lane<T> group;
  int64_t self;         // original index of itself among the references, or -1
  T nearest, farthest;  // values from which on a reference is a candidate; infinity: not in doubt
  double negative_distance, positive_distance;  // running best, exact
  int64_t negative, positive;                   // running best, original index, -1: none
};

// --- the strategies: anchors against all references, a panel of anchors at a time. Their visitors see
//
//     y = -(|x - r|^2 + lacks) / 2    or, with `root`,    y = -|x - r|
//
// of the packed rows, so that the nearest is the largest. It is taken from the product, and from the differences where
// these are small: a function of the two rows and nothing else, so that equal rows tie.

// Both sides of a batch.
template <typename T>
struct Pairing {
  Panels<T> a, b;
  bool root;
  int chain = kChain;
};

// What an anchor's negatives are compared with, ascending. A negative is active for the thresholds below its y, and
// semi-hard for those above.
template <typename T>
struct Thresholds {
  const T* values = nullptr;  // then infinity, up to a power of two less 1
  const T* of = nullptr;      // y of the positives, where the margin is so small that t is not y - value, but
  T shift = 0;                // (y - of) + the margin, this; that is above 0 where y > value
  const T* sums =
      nullptr;  // [count + 1]: of the first so many less `middle`, lest digits cancel; only of all negatives
  T middle = 0;
  Lane<T> count = 0;  // 0: no anchor
};
// From more thresholds than this on, they are searched by halves.
constexpr int kFewThresholds = 16;

// What the loss takes of an anchor's negatives.
struct Excess {
  double loss = 0;      // the sum of max(0, y - threshold); with the soft margin, of log(1 + exp(t))
  double distance = 0;  // the sum of y
  int64_t active = 0;   // triplets with a loss above 0
};

// An anchor's thresholds where the margin is soft: t = (y - middle) * unit[0] * unit[1] - threshold. The unit in two
// parts, for their product may be beyond the range.
template <typename T>
struct SoftThresholds {
  Thresholds<T> thresholds;  // of `middle` 0
  T middle;
  T unit[2];
};

// Room for what is made of a row of y, and of the thresholds.
template <typename T>
struct SoftRoom {
  T *z, *point, *weight;      // [columns + kSoftStep] each
  double* sums;               // the same
  int32_t *place, *interval;  // the same
  T *up, *down;               // [thresholds + kSoftStep] each
  double* linear;             // the same
  int32_t* start;             // the same
};
constexpr int64_t kSoftStep = 64;

// How far the value v = -d/2 of a pair, as the tile engine computes it, may be from the true one: two values that
// differ by more than error(norm, d) compare as the true ones do. From
//     |fl(x.r) - x.r| <= (chain + 1) unit |x| |r|,
// and for the biases, the final subtraction and the centring a few units of (|x| + |r|)^2.
struct RoundingBound {
  double product = 0, rest = 0, absolute = 0, unit = 0;
  double longest = 0;  // the largest norm of a reference
  bool cosine = false, hopeless = false;
};

// For a squared distance d from a row of that norm; the other norm is at most norm + sqrt(d).
TRIPLET_FN double rounding_error(const RoundingBound& bound, double norm, double d) {
  if (bound.hopeless) return std::numeric_limits<double>::infinity();
  const double root = __builtin_sqrt(d > 0 ? d : 0);
  const double other = norm + root < bound.longest ? norm + root : bound.longest, reach = norm + other;
  // Scaling a row to unit length rounds it in proportion to its length, not to its distance from the centre;
  // and what ties with the best must be looked at, too.
  const double scaling = bound.cosine ? bound.unit * (10 * root + 32 * bound.unit) + 2 * kCosineTie : 0;
  return 1.1 * (bound.product * norm * other + bound.rest * reach * reach + scaling) + bound.absolute;
}

// What the negatives of anchors of few thresholds are compared with, by packed anchor: [slots][stride] each, a slot for
// each threshold.
template <typename T>
struct Reach {
  const T* values;   // what is below may lie beyond the threshold; where there is none, -infinity
  const T* certain;  // what is below does, whatever rounding did
  T* floor;          // what is below is not the nearest: the largest y below `certain`, less its error. One more slot,
                     // of -y, is for the farthest of all negatives, which is taken where none lies beyond
  const uint8_t* live;  // [panels]: whether an anchor of a panel has a threshold
  const double* norm;   // of the anchors
  int64_t slots, stride;
};

// A negative that may be the one beyond a threshold of an anchor, and some that were before the floors rose.
template <typename T>
struct Candidate {
  Lane<T> anchor, reference;  // packed
  T y;
};
template <typename T>
struct Candidates {
  Candidate<T>* data;
  int64_t count, room;
  void (*make_room)(Candidates&);  // for some more
};

// Which tiles of kTileRows anchors and one panel hold something: a bit each, `words` of 32 to kTileRows anchors.
struct Marks {
  uint32_t* bits;
  int64_t words;
};

// A pair that pulls on its own, along its difference, not as part of a tile.
template <typename T>
struct Pair {
  int64_t i, j;  // packed anchor and reference
  T weight;
};
// Among them those that are so close that w times a row less w times the other would lose too many digits of w times
// their difference, where w, as with the root of a distance, grows as they come closer: their squared distance in parts
// of the sum of the squared norms. Pairs of equal rows, whose gradient is 0, are none of them.
constexpr double kClose = 0x1p-12;
// What a kernel finds of these, as long as there is room. `weight` is that of the distance: how large that is, the
// packed rows, rounded, may not tell.
template <typename T>
struct Pairs {
  Pair<T>* data;
  int64_t count, room;
  const Lane<T>*equal_a, *equal_b;  // numbers of packed rows; rows of one number are equal
};

// dloss / dy of tiles, those that are not marked undefined: [tile rows' groups][panels][tile rows][panel].
template <typename T>
struct Weights {
  T* tiles;
  int64_t panels;
};

// Everything that one chunk of triplets needs. Index pointers are nullptr where row t belongs to triplet t.
template <typename T>
struct TripletTask {
  Rows<T> anchor, positive, negative;
  const int64_t* a;
  const int64_t* p;  // with `a` absent, -1 in p or n: there is no triplet t
  const int64_t* n;
  int64_t depth;
  Measure measure;
  T* distances;   // [2 or 3, count]
  int64_t count;  // T, the stride of distances
};

// What `forward` adds up.
enum Sum : int { kSumTriplets, kSumActive, kSumLoss, kSumPositive, kSumNegative, kSums };

// One contribution to a row's gradient.
template <typename T>
struct Pull {
  const T* other;  // the row at the other end of the pair
  T weight;        // of (row - other)
  T distance;      // of the pair (cosine only)
};

template <typename T>
struct Kernels {
  int panel;      // rows of a panel
  int tile_rows;  // rows of a tile; divides panel

  // Whether each row is finite ([rows], 0 or 1); returns the largest |x| of the rows that are.
  T (*inspect)(Rows<T> x, int64_t rows, int64_t depth, uint8_t* finite);
  // The squared norm of a row, in float64.
  double (*square)(const T* x, int64_t depth);
  // Packs up to `panel` rows (nullptr: zeros) as x * scale - centre; writes their squared norms, float64.
  void (*pack)(const T* const* rows, const T* scale, const T* centre, int64_t depth, T* out, double* squares);

  // Nearest reference of another class and farthest of the same, for rows of a and, if symmetric, of b too.
  // `self` [a rows]: packed index in b of an anchor itself, or -1.
  void (*hardest)(const Panels<T>& a, const Panels<T>& b, const Lane<T>* self, bool symmetric, Block block,
                  Top2<T> nearest, Top2<T> farthest);
  // The same again for up to `panel` anchors in doubt, whose rows and biases one panel holds.
  void (*settle)(const T* panel, const T* bias, const Panels<T>& b, int64_t b_panels, const Exact<T>& exact,
                 Doubtful<T>* doubtful, int count);
  // The squared norm of x * scale_x - y * scale_y, in float64.
  double (*exact_square)(const T* x, const T* y, int64_t depth, double scale_x, double scale_y);

  // y of one tile's rows, from packed row i on, and panels [begin, end): [tile rows][(end - begin) * panel].
  void (*row_distances)(const Pairing<T>& pairing, int64_t i, int64_t begin, int64_t end, T* y);
  // Collects candidates of the rows of a and, if symmetric, of b too.
  void (*nearest)(const Pairing<T>& pairing, bool symmetric, Block block, const Reach<T>& reach,
                  const RoundingBound& bound, Candidates<T>& candidates);
  // One panel of anchors against panels [begin, end), negatives only. thresholds, excess: [panel]; marks and weights:
  // of this panel of anchors.
  //   excess     adds to `excess`, and marks the tiles with an active triplet
  //   weigh      writes the tiles that are marked, but for pairs that are close, as long as there is room for these,
  //   and
  //              the sums of an anchor's weights of each threshold to `pulls` [count]
  //   negatives  y of the tiles that are marked (of all, without marks): [panel][stride], from `begin` on; NaN for all
  //              else in rows of tiles in which an anchor has thresholds
  void (*excess)(const Pairing<T>& pairing, int64_t a, int64_t begin, int64_t end, const Thresholds<T>* thresholds,
                 Excess* excess, Marks marks);
  void (*weigh)(const Pairing<T>& pairing, int64_t a, int64_t begin, int64_t end, const Thresholds<T>* thresholds,
                const T* weight, double* const* pulls, Marks marks, Weights<T> weights, Pairs<T>* close);
  void (*negatives)(const Pairing<T>& pairing, int64_t a, int64_t begin, int64_t end, const Thresholds<T>* thresholds,
                    Marks marks, T* y, int64_t stride);
  // The same as excess and weigh with the soft margin, for one anchor, `row` of the panel or packed i, and its y.
  void (*soft_excess)(const SoftThresholds<T>& own, int64_t row, int64_t begin, int64_t end, const T* y,
                      SoftRoom<T> room, Excess* excess, Marks marks);
  void (*soft_weigh)(const Pairing<T>& pairing, const SoftThresholds<T>& own, int64_t i, int64_t begin, int64_t end,
                     const T* y, SoftRoom<T> room, T weight, double* pulls, Marks marks, Weights<T> weights,
                     Pairs<T>* close);
  // With the weights w of the marked tiles: out of an anchor -= w row of the reference, panels [begin, end) for one
  // tile's rows of anchors; and the other way round for one panel of references and `groups` tiles' rows of anchors.
  // `rows` and `out` are `width` wide, a multiple of the panel. Adds the weights' sums to `sums`.
  void (*pull_anchors)(Weights<T> weights, Marks marks, int64_t begin, int64_t end, const T* rows, int64_t width,
                       T* out, double* sums);
  void (*pull_references)(Weights<T> weights, Marks marks, int64_t groups, int64_t panel, const T* rows, int64_t width,
                          T* out, double* sums);

  // Triplets [begin, end): writes distances and, where not nullptr, losses; returns sums over them.
  void (*forward)(const TripletTask<T>& task, int64_t begin, int64_t end, T* losses, double* sums);
  // Gradients of explicit triplets [begin, end); the loss of t weighs weight[t * weight_step] * scale.
  void (*backward)(const TripletTask<T>& task, int64_t begin, int64_t end, const T* weight, int64_t weight_step,
                   T scale, T* grad_anchor, T* grad_positive, T* grad_negative);
  // A row's gradient from its pulls.
  void (*gather)(const T* row, int64_t depth, bool cosine, const Pull<T>* pulls, int64_t count, T* grad);
};

// Of the running machine (as ATen sees it, ATEN_CPU_CAPABILITY included).
template <typename T>
const Kernels<T>& kernels();

}  // namespace triplet_ext
