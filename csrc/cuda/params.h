// What launch.cpp hands to the kernels: no torch here, no device code. Every pointer is a device pointer; `acc` is
// double where the elements are double and float for all else.
#pragma once

#include <cstdint>

#include "../triplet.h"

typedef struct CUstream_st* cudaStream_t;

namespace triplet_ext {

enum class Element : int32_t { Float32, Float64, Float16, BFloat16 };

// A matrix in place, strides in elements.
struct Matrix {
  const void* data;
  int64_t rows, row_stride, column_stride;
};

// Of a memory that fills only the device knows how many rows are there. Where kernels are given `there`, that many
// references are, the first ones in every order; null: all.

// The loss of T triplets, explicit or indexed. Triplet t is (anchor[a[t]], positive[p[t]], negative[n[t]]), a null
// index meaning t.
struct TripletParams {
  Matrix anchor, positive, negative;
  const int64_t *a, *p, *n;  // [T], may be null
  // Triplet t is anchor t's, a is null, and where p or n is -1 that anchor has none. Else an index out of range is NaN.
  bool mined;
  int64_t count, depth;
  Measure measure;
  Reduction reduction;
  void* distances;  // acc [2, T], with swap [3, T]
};

struct TripletForwardParams : TripletParams {
  void* loss;        // acc [], with Reduction::None [T]
  double* stats;     // [kStats]
  double* partial;   // [triplet_blocks(T), kStats]
  unsigned* ticket;  // [1], zero before
  unsigned* met;     // [(anchor.rows + 31) / 32], zero before, of indexed triplets; null for others
};

struct TripletBackwardParams : TripletParams {
  const void* grad;  // acc [], with Reduction::None [T]
  int64_t grad_stride;
  const double* stats;
};

// An entry e of the inverse index is triplet e % T in role e / T: 0 anchor (not of mined triplets: every row is the
// anchor of its own, and entries begin at T), 1 positive, 2 negative. Its key is the row it belongs to, rows
// of the references following those of the embeddings where they are apart; -1 if there is none.
struct KeyParams {
  TripletParams triplets;
  bool apart;     // positive and negative are not rows of the anchors' matrix
  int32_t* keys;  // [entries]
};

// Explicit triplets: each row of a gradient belongs to one triplet.
struct ExplicitBackwardParams : TripletBackwardParams {
  void *grad_anchor, *grad_positive, *grad_negative;  // [T, D] each, contiguous
};

// Indexed triplets: each row gathers what pulls at it, by the inverse index.
struct GatherParams : TripletBackwardParams {
  bool apart;
  const int32_t* keys;    // [entries] ascending; null: each row looks through all entries itself
  const int64_t* order;   // [entries] the entries of the keys, counted from the first
  const void* inverse;    // acc [rows], of the cosine distance: 1 / max(norm, floor); null for others
  const void* lack;       // acc [rows]: what the squared norm lacks to 1 after that
  void *grad_x, *grad_r;  // [B, D], [R, D] if apart; contiguous
};

struct NormParams {
  Matrix x;
  int64_t depth;
  void *inverse, *lack;  // acc [rows]
};

// Which references are an anchor itself, hence not its positives: anchor i is reference i + offset, and is those of its
// id. Rows of one id have one label.
struct Own {
  int64_t offset;                  // kNobody: no reference
  const int64_t *ids, *other_ids;  // [B], [R], kNoId: nobody's; null: there are none
};
constexpr int64_t kNobody = -(int64_t(1) << 40);  // far enough below every index for i + offset to meet none

// Batch-hard selection: what is asked for.
struct SelectParams {
  Matrix x, r;  // anchors and references
  const int64_t *labels_x, *labels_r;
  int64_t depth;
  const int64_t* there;  // as count_of() wants it
  Own own;
  // acc [rows], of the cosine distance: 1 / max(norm, floor), and what the squared norm lacks to 1 after that
  const void *inverse_x, *lack_x, *inverse_r, *lack_r;
  int64_t *positive, *negative;  // [B], -1 where there is none
};

// How the tensor cores multiply float32 rows; half types are multiplied as they are.
enum class Products : int32_t { Float32, TF32, BFloat16, Float16 };

// One side of the tiles: rows sorted by label, shifted, scaled and rounded to what is multiplied.
struct TileSide {
  Matrix rows;                 // as given
  const int64_t* labels;       // [count] ascending
  const int64_t* order;        // [count] packed -> given
  const void *inverse, *lack;  // as in SelectParams
  int64_t count, padded;       // padded: a multiple of kTileRows
  const int64_t* there;        // as count_of() wants it
  void* packed;                // [padded, packed_bytes]
  float* bias;                 // [padded] minus half the squared norm of the packed row, far below in the padding
  uint8_t* finite;             // [count] given
  int32_t *low, *high;         // [padded] of an anchor: where its label's references begin and end, packed
};

struct TileParams {
  TileSide x, r;  // the same if symmetric
  bool symmetric;
  Products products;
  int64_t depth, packed_bytes;  // packed_bytes: a multiple of kTileChunk
  Own own;
  float* shift;  // [depth + 1]: the centre, and a power of two to scale with
  // Keys by given anchor, zero before: (ordered value) << 32 | ~index, so that the larger is the better.
  unsigned long long *nearest, *farthest;  // [B]
  unsigned* not_finite;                    // [1], zero before: counts such rows
  int64_t *positive, *negative;            // [B]
  int blocks;                              // that fill the device
};

constexpr int64_t kTileRows = 128, kTileChunk = 64;

// --- every other strategy ---------------------------------------------------------------------------------------

// Anchors and references are counted by their place in the order of their labels ("packed"); a class of references is
// then a range.
struct MinedSide {
  Matrix rows;                 // as given
  const int64_t* labels;       // [rows] ascending
  const int64_t* order;        // [rows] packed -> given
  const int64_t* given;        // [rows] the labels as given
  const void *inverse, *lack;  // as in SelectParams, by given row
  uint8_t* finite;             // [rows] given
  const int64_t* there;        // as count_of() wants it
};

// Of an anchor: its class among the packed references, and those of it that may be its positives (itself among them),
// which are none where the anchor has no triplet.
struct alignas(16) Reach {
  int32_t low, high, begin, end;
};

// What anchors have found about their positives number `first` and on, by packed anchor. A positive that there is not,
// or that is the anchor itself, is a hole: a = -inf, b = 0, n = -1.
struct Entries {
  // acc [slots, B]. Of all negatives: d_ap + m, and dloss/dd_ap. Of one a pair: d_ap and d_an.
  void *a, *b;
  int32_t* n;       // [slots, B] of one negative a pair: its packed row; null for others
  int32_t* chosen;  // [B] of one positive an anchor: its packed row, -1 if there is none; null for others
  int64_t first, slots;
};

struct MinedParams {
  MinedSide x, r;  // the same if not `apart`
  bool apart;
  bool selects;  // anchors that lack a positive or a negative count, too
  int64_t depth;
  Own own;
  PositiveRule positive;
  NegativeRule negative;
  Measure measure;
  Reduction reduction;
  Reach* reach;        // [B] packed
  int32_t* itself;     // [B] packed: how many of its class are the anchor itself
  uint8_t* bad;        // [B] packed: the row itself or a reference in its triplets is not finite
  int32_t* most;       // [(B + 31) / 32] the most positives that an anchor of each 32 has, itself counted
  unsigned* counters;  // [kMinedCounters], zero before
  int64_t chunk;       // positives an anchor that are held in shared memory at a time, at most kMostChunk
};
enum MinedCounter : int { kNotFinite, kBad, kLargest, kTicket, kDone, kMinedCounters };
constexpr int64_t kMostChunk = 64;
constexpr int64_t kMinedRows = 32;  // that a block owns

struct MinedForwardParams : MinedParams {
  void* loss;       // acc [], with Reduction::None [B]
  double* stats;    // [kStats]
  double* partial;  // [mined_blocks(B), kMinedSums]
  Entries saved;    // of the first positives; may have no slots
};
constexpr int kMinedSums = kStats + 1;

struct SelectPairParams : MinedParams {
  int64_t *positive, *negative;  // [B], -1 where there is none
};

// Positives beyond those that were saved are gone through in rounds of `room.slots`: the anchors find out about them,
// then each row takes what concerns it. All rounds are one launch.
struct MinedBackwardParams : MinedParams {
  const void* grad;  // acc [], with Reduction::None [B]
  int64_t grad_stride;
  const double* stats;
  void *grad_x, *grad_r;  // [B, D], and of the first `written` references if apart; contiguous
  int64_t written;
  void *rest_x, *rest_r;  // the same of half types where rounds add up: what grad_x lost to rounding. May be null.
  Entries saved, room;
  int64_t turns;  // items of work that a block takes at most
};

int64_t triplet_blocks(int64_t count);

// Each returns a cudaError_t; 0 is success.
int launch_triplet_forward(const TripletForwardParams& params, Element element, cudaStream_t stream);
int launch_explicit_backward(const ExplicitBackwardParams& params, Element element, cudaStream_t stream);
int launch_keys(const KeyParams& params, cudaStream_t stream);
int launch_gather(const GatherParams& params, Element element, cudaStream_t stream);
int launch_norms(const NormParams& params, Element element, cudaStream_t stream);
// From all pairs, by differences in the accumulation type: exact, no workspace, one launch; time B R D.
int launch_select_pairs(const SelectParams& params, Element element, cudaStream_t stream);
// From tiles of the Gram matrix on the tensor cores. Four launches.
int launch_select_tiles(const TileParams& params, Element element, cudaStream_t stream);
// Selection and loss of the strategies that aren't batch-hard, and the gradient of those losses. Each is preceded by
// two or three launches that look at the rows.
int launch_reach(const MinedParams& params, Element element, cudaStream_t stream);
int launch_select_pair(const SelectPairParams& params, Element element, cudaStream_t stream);
int launch_mined_forward(const MinedForwardParams& params, Element element, cudaStream_t stream);
int launch_mined_backward(const MinedBackwardParams& params, Element element, int64_t blocks, cudaStream_t stream);
int64_t mined_blocks(int64_t count);

}  // namespace triplet_ext
