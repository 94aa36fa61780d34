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
  const Lane<T>* group;  // [panels * panel]: class, ascending; kNoGroup
  const Lane<T>* first;  // [panels]: the lowest class of a panel
  const Lane<T>* last;   // [panels]: the highest
  int64_t depth;
};
constexpr int kNoGroup = -1;

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
  Lane<T> self;         // packed index of itself, or -1
  T nearest, farthest;  // values from which on a reference is a candidate; infinity: not in doubt
  double negative_distance, positive_distance;  // running best, exact
  int64_t negative, positive;                   // running best, original index, -1: none
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
