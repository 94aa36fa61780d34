// Every strategy but batch-hard. The anchors of a panel go through all references together: first their positives,
// whose distances become thresholds; then all negatives, tile by tile, compared with these. What a negative adds to the
// loss and its gradient depends on how many thresholds it passes, so that no pair of a positive and a negative is ever
// looked at (with the soft margin every pair adds something: see soft_impl.h). The gradient is that of the distances'
// weights W = dloss / dd, a strip of anchors at a time: W times the references for the anchors, and W^T times the
// anchors for the references, without the tiles in which W is zero.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>

#include "../ops.h"
#include "restriction.h"
#include "batch.h"
#include "interrupt.h"
#include "pulls.h"

namespace triplet_ext {
namespace {

constexpr int64_t kStripBytes = 8 << 20;  // of weights held at a time
constexpr int64_t kMostPanels = 32;       // whose terms are added up in T
constexpr double kTinyMargin = 0x1p-10;   // beside a distance: rounding their sum would take too much of it
constexpr int64_t kCloseRoom = 4096;      // pairs of a panel of anchors, of those that a kernel finds, or an
constexpr int64_t kCloseShare = 8;        // eighth of all: more would take longer than all products
constexpr int64_t kSoftColumns = 4096;    // negatives that an anchor's sums of the soft margin take at a time
constexpr int64_t kListed = 1 << 19;      // triplets that are held at a time, of whole panels
constexpr int64_t kMeasured = 1 << 15;    // of these, what is measured and pulls at a time
constexpr int64_t kPiece = 256;           // of these, one thread's
constexpr int64_t kCrowd = 128;           // candidates of an anchor that one thread holds

// Ascending by y, equal ones as they came.
template <typename T>
class Sorter {
 public:
  void operator()(std::vector<std::pair<T, Lane<T>>>& pairs) {
    constexpr size_t kFew = 64;
    if (sizeof(T) != 4 || pairs.size() <= kFew) {
      std::stable_sort(pairs.begin(), pairs.end(), [](const auto& p, const auto& q) { return p.first < q.first; });
      return;
    }
    // By the bits, made to ascend as the values do, a byte at a time.
    constexpr int kBytes = 4;
    uint32_t start[kBytes][256] = {};
    keys_.resize(pairs.size());
    next_.resize(pairs.size());
    for (size_t i = 0; i < pairs.size(); ++i) {
      const float y = float(pairs[i].first) + 0.0f;  // -0 is 0
      uint32_t bits;
      std::memcpy(&bits, &y, sizeof(bits));
      bits ^= bits >> 31 ? ~0u : 1u << 31;
      keys_[i] = uint64_t(bits) << 32 | uint32_t(pairs[i].second);
      for (int byte = 0; byte < kBytes; ++byte) ++start[byte][bits >> 8 * byte & 255];
    }
    for (int byte = 0; byte < kBytes; ++byte) {
      const int shift = 32 + 8 * byte;
      if (start[byte][keys_[0] >> shift & 255] == pairs.size()) continue;  // all alike
      uint32_t total = 0;
      for (uint32_t& count : start[byte]) total += std::exchange(count, total);
      for (uint64_t key : keys_) next_[start[byte][key >> shift & 255]++] = key;
      keys_.swap(next_);
    }
    for (size_t i = 0; i < pairs.size(); ++i) {
      uint32_t bits = uint32_t(keys_[i] >> 32);
      bits ^= bits >> 31 ? 1u << 31 : ~0u;
      float y;
      std::memcpy(&y, &bits, sizeof(y));
      pairs[i] = {T(y), Lane<T>(uint32_t(keys_[i]))};
    }
  }

 private:
  std::vector<uint64_t> keys_, next_;
};

// An anchor's negatives, the nearest first: put in order as far as they are looked at. They are spread over buckets of
// equal width, each of which is sorted when it is reached.
template <typename T>
class Descending {
 public:
  using Item = std::pair<T, Lane<T>>;  // y, and the packed reference

  // Of y[0, count), where NaN is none, those below `limit`.
  void fill(const T* y, int64_t count, T limit) {
    constexpr int kLanes = 16;
    T lowest[kLanes];
    std::fill_n(lowest, kLanes, limit);
    for (int64_t j = 0; j + kLanes <= count; j += kLanes)
      for (int l = 0; l < kLanes; ++l) lowest[l] = y[j + l] < lowest[l] ? y[j + l] : lowest[l];
    for (int64_t j = count / kLanes * kLanes; j < count; ++j) lowest[0] = y[j] < lowest[0] ? y[j] : lowest[0];
    least_ = *std::min_element(lowest, lowest + kLanes);
    buckets_ = std::max<int64_t>(1, count / 4);
    step_ = std::min(T(buckets_) / (limit - least_), std::numeric_limits<T>::max());
    start_.assign(buckets_ + 3, 0);
    bucket_.resize(count);
    items_.resize(count);
    sorted_.assign(buckets_, 0);
    for (int64_t j = 0; j < count; ++j) bucket_[j] = y[j] < limit ? bucket_of(y[j]) : int32_t(buckets_);
    for (int64_t j = 0; j < count; ++j) ++start_[bucket_[j] + 2];
    for (int64_t b = 0; b <= buckets_; ++b) start_[b + 2] += start_[b + 1];
    for (int64_t j = 0; j < count; ++j) items_[start_[bucket_[j] + 1]++] = {y[j], Lane<T>(j)};
  }

  int64_t size() const { return start_[buckets_]; }
  const Item& operator[](int64_t place) const { return items_[place]; }

  // Calls f(place) for the items below `limit`, the nearest first, until it returns false.
  template <typename F>
  void each_below(T limit, Sorter<T>& sort, F f) {
    if (size() == 0 || !(limit > least_)) return;
    for (int64_t bucket = bucket_of(limit);;) {
      sort_bucket(bucket, sort);
      int64_t place = start_[bucket + 1];
      while (place > start_[bucket])
        if (items_[--place].first < limit && !f(place)) return;
      if (place == 0) return;
      bucket = bucket_of(items_[place - 1].first);
    }
  }

 private:
  int32_t bucket_of(T y) const { return std::min(int32_t((y - least_) * step_), int32_t(buckets_ - 1)); }

  void sort_bucket(int64_t bucket, Sorter<T>& sort) {
    if (sorted_[bucket]) return;
    sorted_[bucket] = 1;
    const auto begin = items_.begin() + start_[bucket], end = items_.begin() + start_[bucket + 1];
    if (end - begin <= 16) {
      for (auto from = begin; from < end; ++from)
        for (auto to = from; to > begin && to->first < (to - 1)->first; --to) std::swap(*to, *(to - 1));
      return;
    }
    some_.assign(begin, end);
    sort(some_);
    std::copy(some_.begin(), some_.end(), begin);
  }

  T least_, step_;
  int64_t buckets_ = 0;
  std::vector<Item> items_, some_;
  std::vector<int32_t> start_, bucket_;
  std::vector<uint8_t> sorted_;
};

// Room for what the soft margin takes of a panel of anchors.
template <typename T>
class SoftSpace {
 public:
  SoftSpace(int64_t panel, int64_t columns, int64_t thresholds)
      : y_(panel * columns),
        columns_(3 * (columns + kSoftStep)),
        thresholds_(2 * (thresholds + kSoftStep)),
        sums_(columns + kSoftStep),
        linear_(thresholds + kSoftStep),
        places_(2 * (columns + kSoftStep)),
        starts_(thresholds + kSoftStep) {
    T* of_columns = columns_.get();
    for (T** to : {&room.z, &room.point, &room.weight})
      *to = std::exchange(of_columns, of_columns + columns + kSoftStep);
    room.up = thresholds_.get();
    room.down = room.up + thresholds + kSoftStep;
    room.sums = sums_.get();
    room.linear = linear_.get();
    room.place = places_.get();
    room.interval = room.place + columns + kSoftStep;
    room.start = starts_.get();
  }
  T* y() const { return y_.get(); }  // [panel][columns]
  SoftRoom<T> room;

 private:
  Buffer<T> y_, columns_, thresholds_;
  Buffer<double> sums_, linear_;
  Buffer<int32_t> places_, starts_;
};

// A reference that may be selected.
template <typename T>
struct Measured {
  double distance;  // see exact_distance()
  int64_t original;
  T y;
  Lane<T> index;
};

// What is known of a panel of anchors.
template <typename T>
struct Group {
  struct Anchor {
    std::vector<std::pair<T, Lane<T>>> positives;  // those taken: y ascending, and the packed reference
    std::vector<T> values, of, sums;               // see Thresholds
    std::vector<T> certain;                        // see Reach
    std::vector<T> nearest;                        // the negative of each threshold
    std::vector<Lane<T>> nearest_index;
    std::vector<double> pulls;  // on each threshold
  };
  std::vector<Anchor> anchors;
  std::vector<Thresholds<T>> thresholds;
  std::vector<T> distances, row;
  Buffer<Pair<T>> close;
  int64_t close_room = 0;
  std::optional<SoftSpace<T>> soft;
  Triplets triplets;  // of an anchor
  std::vector<T> triplet_distances;
  Sorter<T> sort;
  Descending<T> negatives;
  std::vector<T> y;             // of a panel of anchors of many thresholds
  std::vector<uint8_t> wanted;  // of each reference, in the caller's order: whether it has to be measured,
  std::vector<double> exact;    // and what came out
  std::vector<int64_t> rows;    // those
  std::vector<Measured<T>> candidates;
  std::vector<std::array<int64_t, 3>> doubts;  // a threshold, and the places of its candidates

  explicit Group(int64_t panel) : anchors(panel), thresholds(panel) {}
};

// The next number below one that is below 0.
template <typename T>
T next_below(T x) {
  Lane<T> bits;
  std::memcpy(&bits, &x, sizeof(bits));
  ++bits;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// One pair that a triplet is made of: y, and the packed reference.
template <typename T>
struct Taken {
  T y;
  Lane<T> index;
};

template <typename T>
class Mined {
 public:
  using Scalar = T;

  // largest: what is beyond it is infinite, a square of a distance or of a norm, and t.
  Mined(Side<T>& anchors, Side<T>* references, std::optional<int64_t> offset, const Restriction& restriction,
        PositiveRule positive, NegativeRule negative, const Measure& measure, double largest)
      : restriction_(restriction),
        problem_(anchors, references, offset, measure.distance == Distance::Cosine, largest_scale(measure.margin),
                 kHeadroom),
        a_(problem_.a),
        r_(problem_.r),
        pairing_{a_.view(), r_.view(), measure.distance == Distance::Euclidean},
        fine_{pairing_.a, pairing_.b, false, kFineChain},
        bound_(rounding_bound(problem_)),
        fine_bound_(rounding_bound(problem_, kFineChain)),
        exact_(exact_of(problem_, r_.order.data())),
        tie_(problem_.cosine ? kCosineTie : 0),
        positive_(positive),
        negative_(negative),
        measure_(measure),
        largest_(largest),
        not_finite_(std::count(r_.finite.begin(), r_.finite.end(), uint8_t(0))),
        class_begin_(a_.count),
        class_end_(a_.count) {
    if (!problem_.cosine) unit_[0] = 1 / problem_.scale;
    if (!problem_.cosine && !pairing_.root) unit_[1] = 2 / problem_.scale;
    block_ = std::clamp<int64_t>(kBlockBytes / (panel() * (a_.depth + 1) * int64_t(sizeof(T))), 1, kMostPanels);
    serial_ = double(a_.count) * double(r_.count) * double(a_.depth + 16) < kSerialProducts;
    for (int64_t i = 0, begin = 0, end = 0; i < a_.count; ++i) {
      if (i == 0 || a_.klass[i] != a_.klass[i - 1]) {
        begin = end;
        while (begin < r_.count && r_.klass[begin] < a_.klass[i]) ++begin;
        end = begin;
        while (end < r_.count && r_.klass[end] == a_.klass[i]) ++end;
      }
      class_begin_[i] = begin;
      class_end_[i] = end;
      most_ = std::max(most_, positive_ == PositiveRule::All ? positives_of(i) : 1);
    }
    const double root = std::sqrt(largest_), far = problem_.cosine ? 2 : 4 * a_.depth * std::pow(problem_.largest, 2);
    farthest_ = T(problem_.cosine ? -4 : -(pairing_.root ? root : largest_) / unit_[1] / unit_[0]);
    may_overflow_ = !(far + measure_.margin <= largest_);
    for (const Side<T>* side : {&a_, &r_})
      for (int64_t i = 0; i < side->count && problem_.cosine; ++i) may_overflow_ |= norm_overflows(*side, i);
    if (may_overflow_ && negative_ == NegativeRule::All && !wants_float64()) overflows_ = find_overflows();
  }

  // Whether T is too narrow for the distances between rows as large as these.
  bool wants_float64() const { return std::is_same_v<T, float> && !problem_.cosine && problem_.scale < 0x1p-32; }

  // The positive and the negative of each anchor, where the rules take one of each.
  void select(int64_t* positive, int64_t* negative) const {
    const Found found = find_candidates();
    each_panel(0, a_.panels, [&](int64_t p, Group<T>& group) {
      choose_positives(p, group);
      choose_negatives(p, group, found);
      each_triplet(p, group, [&](int64_t i, int64_t, Taken<T> pos, Taken<T> neg) {
        positive[a_.order[i]] = r_.order[pos.index];
        negative[a_.order[i]] = r_.order[neg.index];
      });
    });
    const auto allows = [&](int64_t anchor, int64_t reference) {
      return reference != problem_.self[anchor] && restriction_.allows(anchor, reference);
    };
    select_not_finite(a_, r_, allows, positive, negative);
    if (!r_.all_finite()) choose_beside_not_finite(positive, negative);
    for (int64_t i = 0; i < a_.count; ++i)
      if (!has_triplets(i)) positive[a_.order[i]] = negative[a_.order[i]] = -1;
  }

  struct Sums {
    std::vector<double> loss, positive, negative;
    std::vector<int64_t> active, triplets;
    explicit Sums(int64_t count) : loss(count), positive(count), negative(count), active(count), triplets(count) {}

    void add(int64_t anchor, T of_triplet, double d_ap, double d_an) {
      loss[anchor] += of_triplet;
      active[anchor] += of_triplet > 0;
      positive[anchor] += d_ap;
      negative[anchor] += d_an;
    }
  };

  // How many triplets there are; and NaN where that is already known to be the sum.
  Sums no_sums() const {
    Sums sums(a_.count);
    for (int64_t i = 0; i < a_.count; ++i) {
      const int64_t o = a_.order[i];
      if (has_triplets(i))
        sums.triplets[o] = (positive_ == PositiveRule::All ? positives_of(i) : 1) *
                           (negative_ == NegativeRule::All ? negatives_of(i) : 1);
      if (spoilt(i)) sums.loss[o] = sums.positive[o] = sums.negative[o] = std::numeric_limits<double>::quiet_NaN();
    }
    return sums;
  }

  // Of each anchor, in the caller's order; `saved` is for the backward.
  Sums forward(int32_t* saved, int64_t width) const {
    Sums sums = no_sums();
    Found found;
    if (negative_ != NegativeRule::All) found = find_candidates();
    each_panel(0, a_.panels, [&](int64_t p, Group<T>& group) {
      choose_positives(p, group);
      if (negative_ == NegativeRule::All) {
        add_all(p, group, marks_fit(width) ? reinterpret_cast<uint32_t*>(saved) : nullptr, sums);
        return;
      }
      choose_negatives(p, group, found);
      each_triplet(p, group, [&](int64_t i, int64_t rank, Taken<T> pos, Taken<T> neg) {
        const int64_t o = a_.order[i];
        sums.add(o, triplet_loss_of(excess_of(i, pos, neg), measure_), distance_of(i, pos), distance_of(i, neg));
        if (negatives_fit(width) && (rank == 0 || negative_ == NegativeRule::SemiHard))
          saved[i * width + rank] = int32_t(neg.index);
        if (distances_fit(width)) std::memcpy(saved_distance(saved, i, rank, width), &neg.y, sizeof(T));
      });
    });
    return sums;
  }

  // The same with `swap`, which takes the distance of a positive and a negative: triplet by triplet.
  Sums forward_swapped() const {
    Sums sums = no_sums();
    const Found found = find_candidates();
    each_panel(0, a_.panels, [&](int64_t p, Group<T>& group) {
      choose_positives(p, group);
      choose_negatives(p, group, found);
      const auto add = [&] {
        const int64_t count = group.triplets.size();
        group.triplet_distances.resize(3 * count);
        T* d = group.triplet_distances.data();
        const TripletTask<T> task = task_of(group.triplets, d);
        measure(task, 0, count);
        for (int64_t t = 0; t < count; ++t) {
          const T an = negative_distance_of(d[count + t], d[2 * count + t], true);
          sums.add(task.a[t], triplet_loss_of(T(d[t] - an + T(measure_.margin)), measure_), d[t], an);
        }
        group.triplets.clear();
      };
      each_triplet(p, group, [&](int64_t i, int64_t rank, Taken<T> pos, Taken<T> neg) {
        if (rank == 0) add();
        group.triplets.add(a_.order[i], r_.order[pos.index], r_.order[neg.index]);
      });
      add();
    });
    return sums;
  }

  // weight: what the loss of each anchor counts. grad_r is not looked at where the anchors are their own references.
  void backward(const Weight<T>& weight, const int32_t* saved, int64_t width, T* grad_x, T* grad_r) const {
    const int64_t P = panel(), tile = P * kernels<T>().tile_rows, depth = (a_.depth + P - 1) / P * P;
    // Differences of single pairs are taken without the centre, which would round each row. With nothing but single
    // pairs there are no products that a centre would serve.
    const bool products = negative_ == NegativeRule::All || most_ > kFewThresholds;
    const std::vector<T> origin(a_.depth);
    const BothRows rows(problem_, products ? problem_.centre : origin, depth);
    std::optional<BothRows> apart;
    std::once_flag once;
    const auto given = [&]() -> const BothRows& {
      if (!products) return rows;
      std::call_once(once, [&] { apart.emplace(problem_, origin, depth); });
      return *apart;
    };
    std::optional<EqualRows<T>> equal;
    if (products && pairing_.root) equal.emplace(problem_);
    Pulled on_x(a_, depth), on_r(r_, problem_.symmetric ? 0 : depth);
    Pulled& other = problem_.symmetric ? on_x : on_r;

    const int64_t groups = P / kernels<T>().tile_rows, words = this->words();
    const int64_t panel_bytes = std::max<int64_t>(1, P * P * r_.panels * int64_t(sizeof(T)));
    const int64_t strip = std::clamp<int64_t>(kStripBytes / panel_bytes, 1, a_.panels);
    const Buffer<T> tiles(strip * groups * r_.panels * tile);
    std::vector<uint32_t> bits(strip * groups * words);
    std::vector<std::vector<Pair<T>>> pairs(strip);
    Found found;
    if (negative_ != NegativeRule::All && !negatives_fit(width)) found = find_candidates();
    for (int64_t from = 0; from < a_.panels; from += strip) {
      const int64_t to = std::min(a_.panels, from + strip);
      std::fill(bits.begin(), bits.end(), 0);
      const auto strip_of = [&](int64_t p) {
        return Strip{{tiles.get() + (p - from) * groups * r_.panels * tile, r_.panels},
                     {bits.data() + (p - from) * groups * words, words},
                     equal ? &*equal : nullptr};
      };
      each_panel(from, to, [&](int64_t p, Group<T>& group) {
        const Strip here = strip_of(p);
        auto& alone = pairs[p - from];
        alone.clear();
        weigh(p, group, weight, saved, width, here, found, alone);
        if (!alone.empty()) {
          const Alone pulls(&alone, 1, true, given().r, depth, p * P, P);
          group.row.resize(depth);
          for (int64_t i = p * P; i < (p + 1) * P; ++i) pulls.add(i, given().x, group.row.data(), on_x);
        }
        each_block([&](int64_t begin, int64_t end) {
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t i = p * P + g * kernels<T>().tile_rows;
            kernels<T>().pull_anchors({here.weights.tiles + g * r_.panels * tile, r_.panels},
                                      {here.marks.bits + g * words, words}, begin, end, rows.r, depth,
                                      on_x.rows.get() + i * depth, on_x.sums.data() + i);
          }
        });
      });
      const Strip whole = strip_of(from);
      pairs.resize(to - from);
      const bool any = std::any_of(pairs.begin(), pairs.end(), [](const auto& some) { return !some.empty(); });
      const BothRows* of_alone = any ? &given() : &rows;
      const Alone alone(pairs.data(), to - from, false, of_alone->x, depth, 0, r_.panels * P);
      each(r_.panels, [&](Tasks& tasks) {
        std::vector<T> room(depth);
        for (int64_t p; tasks.take(p);) {
          kernels<T>().pull_references(whole.weights, whole.marks, (to - from) * groups, p, rows.x + from * P * depth,
                                       depth, other.rows.get() + p * P * depth, other.sums.data() + p * P);
          for (int64_t j = p * P; j < (p + 1) * P; ++j) alone.add(j, of_alone->r, room.data(), other);
        }
      });
    }
    write(a_, rows.x, on_x, depth, grad_x);
    if (!problem_.symmetric) write(r_, rows.r, on_r, depth, grad_r);
    poison(grad_x, grad_r);
  }

  // The same with `swap`. The triplets are those of some panels at a time, and pull in their order.
  void backward_swapped(const Weight<T>& weight, T* grad_x, T* grad_r) const {
    const int64_t strip = std::clamp<int64_t>(kListed / (panel() * std::max<int64_t>(1, most_)), 1, a_.panels);
    Pulls<T> pulls(a_.count, problem_.symmetric ? 0 : r_.count, a_.depth);
    const Found found = find_candidates();
    for (int64_t from = 0; from < a_.panels; from += strip) {
      const int64_t to = std::min(a_.panels, from + strip);
      std::vector<Triplets> listed(to - from);
      each_panel(from, to, [&](int64_t p, Group<T>& group) {
        choose_positives(p, group);
        choose_negatives(p, group, found);
        each_triplet(p, group, [&](int64_t i, int64_t, Taken<T> pos, Taken<T> neg) {
          listed[p - from].add(a_.order[i], r_.order[pos.index], r_.order[neg.index]);
        });
      });
      Triplets some;
      const auto add = [&] {
        std::vector<T> distances(3 * some.size());
        const TripletTask<T> task = task_of(some, distances.data());
        each((task.count + kPiece - 1) / kPiece, [&](Tasks& tasks) {
          for (int64_t t; tasks.take(t);) measure(task, t * kPiece, std::min(task.count, (t + 1) * kPiece));
        });
        pulls.add(task, [&](int64_t t) { return weight.of(task.a[t]); }, grad_x, grad_r);
        some.clear();
      };
      for (const Triplets& triplets : listed)
        for (int64_t t = 0; t < triplets.size(); ++t) {
          some.add(triplets.anchor[t], triplets.positive[t], triplets.negative[t]);
          if (some.size() == kMeasured) add();
        }
      add();
    }
    poison(grad_x, grad_r);
  }

  // Rows that are not finite, and what pulls at them.
  void poison(T* grad_x, T* grad_r) const {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    bool any = false;
    for (int64_t i = 0; i < a_.count; ++i) {
      if (!spoilt(i)) continue;
      any = true;
      std::fill_n(grad_x + a_.order[i] * a_.depth, a_.depth, nan);
    }
    if (any) std::fill_n(problem_.symmetric ? grad_x : grad_r, r_.count * r_.depth, nan);
  }

 private:
  using Measured = triplet_ext::Measured<T>;

  struct Strip {
    Weights<T> weights;
    Marks marks;
    const EqualRows<T>* equal;  // where pairs may be close, or nullptr
  };

  // The rows of both sides, side by side, less a centre.
  struct BothRows {
    Buffer<T> of_x, of_r;
    const T *x, *r;
    BothRows(const Problem<T>& problem, const std::vector<T>& centre, int64_t width)
        : of_x(problem.a.packed_rows(problem.scale, centre, width)),
          of_r(problem.symmetric ? Buffer<T>(0) : problem.r.packed_rows(problem.scale, centre, width)),
          x(of_x.get()),
          r(problem.symmetric ? x : of_r.get()) {}
  };

  // The pulls on the rows of one side, without the part along the row itself in the tiles, and the sums of the weights:
  // of the tiles, and of single pairs.
  struct Pulled {
    Buffer<T> rows;
    std::vector<double> sums, alone;
    Pulled(const Side<T>& side, int64_t width)
        : rows(side.panels * panel() * width), sums(side.panels * panel()), alone(side.panels * panel()) {
      std::fill_n(rows.get(), side.panels * panel() * width, T(0));
    }
  };

  // The pulls of single pairs on the rows [first, first + rows) of one side, in the order of the pairs.
  class Alone {
   public:
    Alone(const std::vector<Pair<T>>* pairs, int64_t lists, bool on_anchors, const T* others, int64_t depth,
          int64_t first, int64_t rows)
        : first_(first), depth_(depth), start_(rows + 1) {
      const auto each_pair = [&](auto f) {
        for (int64_t list = 0; list < lists; ++list)
          for (const Pair<T>& pair : pairs[list])
            f((on_anchors ? pair.i : pair.j) - first, others + (on_anchors ? pair.j : pair.i) * depth, pair.weight);
      };
      each_pair([&](int64_t row, const T*, T) { ++start_[row + 1]; });
      for (int64_t row = 0; row < rows; ++row) start_[row + 1] += start_[row];
      pulls_.resize(start_[rows]);
      std::vector<int64_t> next(start_.begin(), start_.end() - 1);
      each_pair([&](int64_t row, const T* other, T weight) { pulls_[next[row]++] = {other, weight, T(0)}; });
    }

    // Adds those on row i of `rows`. There is room for one row.
    void add(int64_t i, const T* rows, T* room, Pulled& to) const {
      const int64_t begin = start_[i - first_], end = start_[i - first_ + 1];
      if (begin == end) return;
      kernels<T>().gather(rows + i * depth_, depth_, false, pulls_.data() + begin, end - begin, room);
      T* out = to.rows.get() + i * depth_;
      for (int64_t k = 0; k < depth_; ++k) out[k] += room[k];
      for (int64_t e = begin; e < end; ++e) to.alone[i] += pulls_[e].weight;
    }

   private:
    int64_t first_, depth_;
    std::vector<int64_t> start_;
    std::vector<Pull<T>> pulls_;
  };

  static constexpr int kHeadroom = std::is_same_v<T, float> ? 0 : 500;

  // The exponent of the largest scale: the margin is scaled, too, by its square.
  static int largest_scale(double margin) {
    constexpr int kRange = std::is_same_v<T, float> ? 100 : 900, kMost = std::is_same_v<T, float> ? 40 : 400;
    return std::min(kMost, (kRange - std::ilogb(std::max(margin, 1.0))) / 2);
  }

  static constexpr int64_t kWords = sizeof(T) / sizeof(int32_t);

  static int64_t panel() { return kernels<T>().panel; }
  int64_t positives_of(int64_t i) const {
    const int64_t self = problem_.packed_self[i];  // as a reference it may have another label
    int64_t count = class_end_[i] - class_begin_[i] - (class_begin_[i] <= self && self < class_end_[i]);
    if (restriction_.given) return std::min<int64_t>(count, restriction_.given[a_.order[i]] >= 0);
    for (int64_t j = class_begin_[i]; restriction_.ids && j < class_end_[i]; ++j)
      count -= !restriction_.allows(a_.order[i], r_.order[j]);
    return count;
  }
  int64_t negatives_of(int64_t i) const { return r_.count - (class_end_[i] - class_begin_[i]); }
  bool has_triplets(int64_t i) const { return positives_of(i) > 0 && negatives_of(i) > 0; }

  // Whether a row that is not finite is among an anchor's triplets, or is the anchor, or a distance is infinite: that
  // is never left out.
  bool spoilt(int64_t i) const {
    return !a_.finite[a_.order[i]] || (has_triplets(i) && meets_not_finite(i)) ||
           (!overflows_.empty() && overflows_[i]);
  }
  // Whether a reference is not finite that the anchor does not leave out.
  bool meets_not_finite(int64_t i) const {
    int64_t count = not_finite_;
    const auto leave_out = [&](int64_t j) { count -= !r_.finite[r_.order[j]]; };
    const int64_t self = problem_.packed_self[i];
    if (class_begin_[i] <= self && self < class_end_[i]) leave_out(self);
    for (int64_t j = class_begin_[i]; restriction_.ids && count > 0 && j < class_end_[i]; ++j)
      if (j != self && !restriction_.allows(a_.order[i], r_.order[j])) leave_out(j);
    return count > 0;
  }

  bool norm_overflows(const Side<T>& side, int64_t i) const {
    return side.finite[side.order[i]] && side.scale[side.order[i]] * std::sqrt(largest_) < 1;
  }
  // Whether a distance is infinite.
  bool overflows(int64_t i, Taken<T> other) const {
    return may_overflow_ &&
           (other.y < farthest_ || (problem_.cosine && (norm_overflows(a_, i) || norm_overflows(r_, other.index))));
  }

  // Which anchors have a triplet whose t is not finite, where every negative is taken.
  std::vector<uint8_t> find_overflows() const {
    std::vector<uint8_t> found(a_.panels * panel());
    each_panel(0, a_.panels, [&](int64_t p, Group<T>& group) {
      const int64_t P = panel(), tile_rows = kernels<T>().tile_rows;
      choose_positives(p, group);
      for (int64_t i = p * P; i < (p + 1) * P; i += tile_rows) {
        std::vector<T> nearest(tile_rows, -std::numeric_limits<T>::infinity());
        each_block([&](int64_t begin, int64_t end) {
          const int64_t stride = (end - begin) * P;
          group.distances.resize(tile_rows * stride);
          kernels<T>().row_distances(pairing_, i, begin, end, group.distances.data());
          for (int64_t r = 0; r < tile_rows; ++r)
            for (int64_t j = begin * P; takes_part(i + r) && j < std::min(end * P, r_.count); ++j) {
              if ((class_begin_[i + r] <= j && j < class_end_[i + r]) || r_.group.get()[j] == kNoGroup) continue;
              const Taken<T> negative{group.distances[r * stride + j - begin * P], Lane<T>(j)};
              nearest[r] = std::max(nearest[r], negative.y);
              found[i + r] |= overflows(i + r, negative);
            }
        });
        for (int64_t r = 0; r < tile_rows; ++r)
          for (const auto& [y, j] : group.anchors[i + r - p * P].positives) {
            found[i + r] |= overflows(i + r, {y, j});
            found[i + r] |= !(distance_of(y) - distance_of(nearest[r]) + measure_.margin <= largest_);
          }
      }
    });
    return found;
  }

  // What `saved` has room for.
  int64_t words() const { return (r_.panels + 31) / 32; }
  bool marks_fit(int64_t width) const {
    const int64_t rows = kernels<T>().tile_rows;
    return (a_.count + rows - 1) / rows * words() <= a_.count * width;
  }
  bool negatives_fit(int64_t width) const { return negative_ == NegativeRule::Hard ? width > 0 : most_ <= width; }

  // Behind them, if there is room, y of the negatives.
  bool distances_fit(int64_t width) const { return most_ * (1 + kWords) <= width; }
  template <typename I>
  I* saved_distance(I* saved, int64_t i, int64_t rank, int64_t width) const {
    return saved + i * width + most_ + rank * kWords;
  }

  template <typename F>
  void each(int64_t count, F f) const {
    const int64_t threads = serial_ ? 1 : std::min<int64_t>(at::get_num_threads(), count);
    Tasks tasks(count);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) f(tasks);
    });
  }

  template <typename F>
  void each_panel(int64_t from, int64_t to, F f) const {
    each(to - from, [&](Tasks& tasks) {
      Group<T> group(panel());
      for (int64_t p; tasks.take(p);) f(from + p, group);
    });
  }

  template <typename F>
  void each_block(F f) const {
    each_block(0, r_.panels, f);
  }
  template <typename F>
  void each_block(int64_t from, int64_t to, F f) const {
    for (int64_t begin = from; begin < to; begin += block_) f(begin, std::min(to, begin + block_));
  }

  // Triplets as what the kernels take.
  TripletTask<T> task_of(const Triplets& triplets, T* distances) const {
    return {a_.rows,  r_.rows,  r_.rows,   triplets.anchor.data(), triplets.positive.data(), triplets.negative.data(),
            a_.depth, measure_, distances, triplets.size()};
  }

  // The distances of some.
  void measure(const TripletTask<T>& task, int64_t begin, int64_t end) const {
    double sums[kSums];
    kernels<T>().forward(task, begin, end, nullptr, sums);
    if (largest_ >= std::numeric_limits<T>::max()) return;
    // They are those of a narrower type.
    const double farthest = pairing_.root ? std::sqrt(largest_) : largest_;
    T* d = task.distances;
    for (int64_t t = begin; t < end; ++t) {
      for (int pair = 0; pair < 3; ++pair)
        if (d[pair * task.count + t] > farthest) d[pair * task.count + t] = std::numeric_limits<T>::infinity();
      const T an = negative_distance_of(d[task.count + t], d[2 * task.count + t], true);
      if (d[t] - an + measure_.margin > largest_) d[t] = std::numeric_limits<T>::infinity();
    }
  }

  // Of a pair.
  double distance_of(double y) const { return -(y * unit_[0]) * unit_[1]; }
  double distance_of(int64_t i, Taken<T> other) const {
    return overflows(i, other) ? std::numeric_limits<double>::infinity() : distance_of(other.y);
  }
  // d_ap - d_an + m.
  T excess_of(int64_t i, Taken<T> pos, Taken<T> neg) const {
    const double t = (neg.y - pos.y) * unit_[0] * unit_[1] + measure_.margin;
    const bool infinite = may_overflow_ && (overflows(i, pos) || overflows(i, neg) || !(std::fabs(t) <= largest_));
    return infinite ? std::numeric_limits<T>::quiet_NaN() : T(t);
  }

  void choose_positives(int64_t p, Group<T>& group) const {
    const int64_t P = panel(), tile_rows = kernels<T>().tile_rows;
    for (int64_t g = 0; g < P; g += tile_rows) {
      int64_t begin = r_.count, end = 0;
      for (int64_t r = g; r < g + tile_rows; ++r) {
        group.anchors[r].positives.clear();
        if (!takes_part(p * P + r)) continue;
        begin = std::min(begin, class_begin_[p * P + r]);
        end = std::max(end, class_end_[p * P + r]);
      }
      if (begin >= end) continue;
      const int64_t first = begin / P, last = (end + P - 1) / P, stride = (last - first) * P;
      group.distances.resize(tile_rows * stride);
      kernels<T>().row_distances(selects() ? fine_ : pairing_, p * P + g, first, last, group.distances.data());
      for (int64_t r = g; r < g + tile_rows; ++r) {
        const int64_t i = p * P + r;
        if (!takes_part(i)) continue;
        choose_positives(i, group.distances.data() + (r - g) * stride - first * P, group.anchors[r]);
        group.sort(group.anchors[r].positives);
      }
    }
  }

  void choose_positives(int64_t i, const T* y, typename Group<T>::Anchor& anchor) const {
    auto& taken = anchor.positives;
    for (int64_t j = class_begin_[i]; j < class_end_[i]; ++j)
      if (j != problem_.packed_self[i] && r_.group.get()[j] != kNoGroup &&
          restriction_.allows(a_.order[i], r_.order[j]))
        taken.push_back({y[j], Lane<T>(j)});
    if (positive_ == PositiveRule::All || taken.empty()) return;
    const bool farthest = positive_ == PositiveRule::Hard;
    T best = taken[0].first;
    for (const auto& [y, j] : taken) best = farthest ? std::min(best, y) : std::max(best, y);
    const double error = rounding_error(bound_, a_.norm[i], -2 * double(best));
    std::vector<Measured> candidates;
    for (const auto& [y, j] : taken)
      if (!(std::fabs(double(y) - double(best)) > error)) candidates.push_back({0, r_.order[j], y, j});
    if (candidates.size() > 1)
      for (Measured& candidate : candidates)
        candidate.distance = exact_distance(exact_, a_.order[i], candidate.original);
    const Measured& chosen = extreme(candidates, farthest);
    taken.assign(1, {negative_ == NegativeRule::All ? measured(i, chosen.index) : chosen.y, chosen.index});
  }

  // The negative of anchors whose positive isn't finite: none is farther than that, hence semi-hard is the farthest.
  void choose_beside_not_finite(const int64_t* positive, int64_t* negative) const {
    const double infinite = std::numeric_limits<double>::infinity();
    each_panel(0, a_.panels, [&](int64_t p, Group<T>&) {
      for (int64_t i = p * panel(); i < (p + 1) * panel(); ++i) {
        if (!takes_part(i)) continue;
        const int64_t o = a_.order[i];
        if (r_.finite[positive[o]] || !r_.finite[negative[o]]) continue;
        negative[o] = Ranking(*this, i).nearest_beyond(negative_ == NegativeRule::Hard ? -infinite : infinite).original;
      }
    });
  }

  // Whether pairs are selected by their distance, not taken all; then distances have no root.
  bool selects() const { return positive_ != PositiveRule::All || negative_ != NegativeRule::All; }

  // The nearest or the farthest of those that are `wanted`; of those that tie, the first. nullptr: there is none.
  template <typename F>
  const Measured* extreme(std::vector<Measured>& candidates, bool farthest, F wanted) const {
    const double sign = farthest ? -1 : 1;
    double best = std::numeric_limits<double>::infinity();
    for (Measured& candidate : candidates)
      if (wanted(candidate)) best = std::min(best, sign * candidate.distance);
    const Measured* chosen = nullptr;
    for (Measured& candidate : candidates)
      if (wanted(candidate) && sign * candidate.distance <= best + tie_ &&
          (!chosen || candidate.original < chosen->original))
        chosen = &candidate;
    return chosen;
  }
  const Measured& extreme(std::vector<Measured>& candidates, bool farthest) const {
    return *extreme(candidates, farthest, [](const Measured&) { return true; });
  }

  // y of a pair from its differences, in float64.
  T measured(int64_t i, int64_t j) const { return y_of(exact_distance(exact_, a_.order[i], r_.order[j])); }

  bool takes_part(int64_t i) const { return i < a_.count && a_.finite[a_.order[i]] && has_triplets(i); }

  // The thresholds of each anchor for all of its negatives: its positives' y.
  void set_thresholds(Group<T>& group) const {
    for (int64_t r = 0; r < panel(); ++r) {
      auto& anchor = group.anchors[r];
      const int64_t count = int64_t(anchor.positives.size());
      int64_t room = 1;
      while (room <= count) room *= 2;
      anchor.values.assign(room, std::numeric_limits<T>::infinity());
      for (int64_t t = 0; t < count; ++t) anchor.values[t] = anchor.positives[t].first;
      const T middle = count ? anchor.values[count / 2] : T(0);
      anchor.sums.resize(count + 1);
      double total = anchor.sums[0] = 0;
      for (int64_t t = 0; t < count; ++t) anchor.sums[t + 1] = T(total += double(anchor.values[t]) - double(middle));
      group.thresholds[r] = {anchor.values.data(), nullptr, T(0), anchor.sums.data(), middle, Lane<T>(count)};
    }
  }

  // The thresholds where all negatives are taken.
  void set_margins(Group<T>& group) const {
    set_thresholds(group);
    const T shift = T(measure_.margin / unit_[1] / unit_[0]);
    for (int64_t r = 0; r < panel() && !measure_.soft_margin; ++r) {
      auto& anchor = group.anchors[r];
      Thresholds<T>& own = group.thresholds[r];
      const bool tiny = own.count && shift < -anchor.values[0] * T(kTinyMargin);
      if (tiny) anchor.of.assign(anchor.values.begin(), anchor.values.begin() + own.count);
      T* values = anchor.values.data();
      for (int64_t t = 0; t < own.count; ++t) values[t] -= shift;
      for (int64_t t = 0; tiny && t < own.count; ++t)
        if ((values[t] - anchor.of[t]) + shift > 0) values[t] = next_below(values[t]);
      own.of = tiny ? anchor.of.data() : nullptr;
      own.shift = shift;
    }
  }

  // f(row of the panel, its thresholds, panels [begin, end), y of its negatives among these, room), where the margin is
  // soft, after set_margins. Of tiles that are not `wanted` nothing is a negative.
  template <typename F>
  void each_soft_row(int64_t p, Group<T>& group, Marks wanted, F f) const {
    const int64_t P = panel(), step = std::min(r_.panels, std::max(block_, kSoftColumns / P)), columns = step * P;
    if (!group.soft) group.soft.emplace(P, columns, most_);
    std::vector<SoftThresholds<T>> own(P);
    for (int64_t r = 0; r < P; ++r) {
      auto& anchor = group.anchors[r];
      const T middle = group.thresholds[r].middle;
      const int64_t count = group.thresholds[r].count;
      double total = 0;
      for (int64_t t = 0; t < count; ++t) {
        anchor.values[t] = T((anchor.values[t] - middle) * unit_[0] * unit_[1] - measure_.margin);
        anchor.sums[t + 1] = T(total += anchor.values[t]);
      }
      own[r].thresholds = {anchor.values.data(), nullptr, T(0), anchor.sums.data(), T(0), Lane<T>(count)};
      own[r].middle = middle;
      std::copy_n(unit_, 2, own[r].unit);
    }
    for (int64_t begin = 0; begin < r_.panels; begin += step) {
      const int64_t end = std::min(r_.panels, begin + step);
      each_block(begin, end, [&](int64_t from, int64_t to) {
        kernels<T>().negatives(pairing_, p, from, to, group.thresholds.data(), wanted,
                               group.soft->y() + (from - begin) * P, columns);
      });
      for (int64_t r = 0; r < P; ++r)
        if (own[r].thresholds.count > 0) f(r, own[r], begin, end, group.soft->y() + r * columns, group.soft->room);
    }
  }

  void add_all(int64_t p, Group<T>& group, uint32_t* saved, Sums& sums) const {
    const int64_t P = panel(), groups = P / kernels<T>().tile_rows;
    std::vector<uint32_t> unsaved(saved ? 0 : groups * words());
    std::vector<Excess> excess(P);
    for (int64_t r = 0; r < P && may_overflow_; ++r) {  // the triplets of these have no loss that is above 0
      auto& taken = group.anchors[r].positives;
      const auto infinite = [&](const auto& positive) {
        return overflows(p * P + r, {positive.first, positive.second});
      };
      taken.erase(std::remove_if(taken.begin(), taken.end(), infinite), taken.end());
    }
    set_margins(group);
    const Marks marks{saved ? saved + p * groups * words() : unsaved.data(), words()};
    if (measure_.soft_margin)
      each_soft_row(p, group, {nullptr, 0},
                    [&](int64_t r, const auto& own, int64_t begin, int64_t end, const T* y, auto room) {
                      kernels<T>().soft_excess(own, r, begin, end, y, room, &excess[r], marks);
                    });
    else
      each_block([&](int64_t begin, int64_t end) {
        kernels<T>().excess(pairing_, p, begin, end, group.thresholds.data(), excess.data(), marks);
      });
    for (int64_t r = 0; r < P; ++r) {
      const auto& taken = group.anchors[r].positives;
      if (taken.empty()) continue;
      const int64_t i = p * P + r, o = a_.order[i];
      double total = 0;
      for (const auto& positive : taken) total -= positive.first;
      sums.loss[o] += measure_.soft_margin ? excess[r].loss : -distance_of(excess[r].loss);
      if (!std::isfinite(sums.loss[o])) sums.loss[o] = std::numeric_limits<double>::quiet_NaN();
      sums.active[o] += excess[r].active;
      sums.positive[o] += -distance_of(total) * double(negatives_of(i));
      sums.negative[o] += distance_of(excess[r].distance) * double(taken.size());
    }
  }

  // How far each threshold reaches, rounding considered: a negative below `values` may lie beyond the positive, and one
  // below `certain` does. Where only the nearest negative counts, all lie beyond, and the farthest is not looked for.
  void set_reach(int64_t i, typename Group<T>::Anchor& anchor) const {
    constexpr T kEverything = std::numeric_limits<T>::infinity();
    const int64_t count = negatives_sought(anchor);
    const RoundingBound& bound = count <= kFewThresholds ? bound_ : fine_bound_;
    anchor.values.assign(count, kEverything);
    anchor.certain.assign(count + 1, kEverything);
    for (int64_t t = 0; t < count && negative_ == NegativeRule::SemiHard; ++t) {
      const T y = anchor.positives[t].first;
      const double error = rounding_error(bound, a_.norm[i], -2 * double(y));
      anchor.values[t] = t ? std::max(anchor.values[t - 1], T(y + error)) : T(y + error);
      anchor.certain[t] = T(y - error);
    }
  }

  // How many negatives an anchor's triplets have: one for each of its positives, or one for all.
  int64_t negatives_sought(const typename Group<T>::Anchor& anchor) const {
    return negative_ == NegativeRule::Hard ? !anchor.positives.empty() : int64_t(anchor.positives.size());
  }

  // What find_candidates() knows of the anchors of few thresholds.
  struct Found {
    std::vector<T> values, certain, floor;  // see Reach
    std::vector<uint8_t> live;
    std::vector<Candidate<T>> candidates;  // by anchor
    std::vector<int64_t> start;            // of those of each packed anchor
    int64_t slots = 0, stride = 0;

    Reach<T> reach(const Side<T>& a, T* own_floor) const {
      return {values.data(), certain.data(), own_floor, live.data(), a.norm.data(), slots, stride};
    }
    // Whether it may be the one beyond a threshold, floors as they are.
    bool wants(const T* own_floor, const Candidate<T>& c) const {
      bool wanted = -c.y >= own_floor[slots * stride + c.anchor];
      for (int64_t at = c.anchor; at < slots * stride; at += stride) wanted |= c.y < values[at] && c.y >= own_floor[at];
      return wanted;
    }
    // So many negatives are so close to each other that they are not candidates, but all are looked at.
    bool crowded(int64_t i) const { return floor[i] == std::numeric_limits<T>::infinity(); }
  };

  // What one thread finds.
  struct Finder : Candidates<T> {
    Finder(Found& found, std::mutex& mutex) : found(found), mutex(mutex), floor(found.floor) {
      list.resize(std::max<int64_t>(1 << 14, (4 + 2 * found.slots) * found.stride));
      this->data = list.data();
      this->count = 0;
      this->room = int64_t(list.size());
      this->make_room = [](Candidates<T>& self) { static_cast<Finder&>(self).drop(); };
    }

    // What all threads know of the floors.
    void share() {
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t k = 0; k < floor.size(); ++k) floor[k] = found.floor[k] = std::max(floor[k], found.floor[k]);
    }

    void drop_below() {
      const auto below = [&](const Candidate<T>& c) { return !found.wants(floor.data(), c); };
      this->count = std::remove_if(list.begin(), list.begin() + this->count, below) - list.begin();
    }

    void drop() {
      share();
      drop_below();
      if (this->count > this->room / 2) {
        std::vector<int64_t> each(found.stride);
        for (int64_t k = 0; k < this->count; ++k) ++each[list[k].anchor];
        for (int64_t i = 0; i < found.stride; ++i)
          for (int64_t slot = 0; each[i] > kCrowd && slot <= found.slots; ++slot)
            floor[slot * found.stride + i] = std::numeric_limits<T>::infinity();
        drop_below();
      }
      if (this->count > this->room / 2) list.resize(2 * list.size());
      this->data = list.data();
      this->room = int64_t(list.size());
    }

    Found& found;
    std::mutex& mutex;
    std::vector<T> floor;
    std::vector<Candidate<T>> list;
  };

  // The candidates of all anchors of few thresholds.
  Found find_candidates() const {
    Found found = few_thresholds();
    if (std::find(found.live.begin(), found.live.end(), 1) == found.live.end()) return found;
    const std::vector<T> floor = found.floor;
    look(found, r_, problem_.symmetric);
    int64_t crowded = 0;
    for (int64_t i = 0; i < a_.count; ++i) crowded += found.crowded(i);
    if (crowded * kManyDoubts < a_.count) return found;
    // Usually because many rows are equal.
    const std::vector<int64_t> packed = first_negatives(r_, first_equal());
    found.floor = floor;
    look(found, r_.subset(packed, problem_.scale, problem_.centre), false);
    for (Candidate<T>& candidate : found.candidates) candidate.reference = Lane<T>(packed[candidate.reference]);
    return found;
  }

  Found few_thresholds() const {
    constexpr T kEverything = std::numeric_limits<T>::infinity();
    const int64_t P = panel();
    Found found;
    found.stride = a_.panels * P;
    found.slots = negative_ == NegativeRule::Hard ? 1 : std::min<int64_t>(most_, kFewThresholds);
    found.values.assign(found.slots * found.stride, -kEverything);
    found.certain = found.values;
    found.floor.assign((found.slots + 1) * found.stride, -kEverything);
    std::fill_n(found.floor.data() + found.slots * found.stride, found.stride, kEverything);
    found.live.assign(a_.panels, 0);
    found.start.assign(found.stride + 1, 0);
    each_panel(0, a_.panels, [&](int64_t p, Group<T>& group) {
      choose_positives(p, group);
      for (int64_t r = 0; r < P; ++r) {
        auto& anchor = group.anchors[r];
        const int64_t count = negatives_sought(anchor), i = p * P + r;
        if (count == 0 || count > kFewThresholds) continue;
        set_reach(i, anchor);
        found.live[p] = 1;
        for (int64_t t = 0; t < count; ++t) {
          found.values[t * found.stride + i] = anchor.values[t];
          found.certain[t * found.stride + i] = anchor.certain[t];
        }
        if (negative_ == NegativeRule::SemiHard) found.floor[found.slots * found.stride + i] = -kEverything;
      }
    });
    return found;
  }

  // Looks at every tile once.
  void look(Found& found, const Side<T>& among, bool symmetric) const {
    const Pairing<T> squares{pairing_.a, among.view(), false};
    const int64_t threads = serial_ ? 1 : at::get_num_threads();
    int64_t block = std::min<int64_t>(block_, 16);
    const auto blocks = [&](const Side<T>& side) { return (side.panels + block - 1) / block; };
    while (block > 1 && threads > 1 && blocks(a_) * blocks(among) < 16 * threads) block /= 2;
    const int64_t columns = blocks(among);
    std::mutex mutex;
    std::deque<Finder> finders;
    for (int64_t thread = 0; thread < threads; ++thread) finders.emplace_back(found, mutex);
    Tasks tasks(blocks(a_) * columns);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        Finder& mine = finders[thread];
        const Reach<T> reach = found.reach(a_, mine.floor.data());
        for (int64_t task; tasks.take(task);) {
          const int64_t i = task / columns, j = task % columns;
          if (symmetric && j < i) continue;
          const Block here{i * block, std::min(a_.panels, (i + 1) * block), j * block,
                           std::min(among.panels, (j + 1) * block)};
          kernels<T>().nearest(squares, symmetric, here, reach, bound_, mine);
        }
      }
    });
    for (Finder& finder : finders) finder.share();
    found.start.assign(found.stride + 1, 0);
    for (Finder& finder : finders) {
      finder.floor = found.floor;
      finder.drop_below();
      for (int64_t k = 0; k < finder.count; ++k) ++found.start[finder.list[k].anchor + 1];
    }
    for (int64_t i = 0; i < found.stride; ++i) found.start[i + 1] += found.start[i];
    found.candidates.resize(found.start[found.stride]);
    std::vector<int64_t> next(found.start.begin(), found.start.end() - 1);
    for (const Finder& finder : finders)
      for (int64_t k = 0; k < finder.count; ++k) found.candidates[next[finder.list[k].anchor]++] = finder.list[k];
  }

  // The negative of each pair.
  void choose_negatives(int64_t p, Group<T>& group, const Found& found) const {
    const int64_t P = panel(), stride = r_.panels * P;
    std::vector<Thresholds<T>> many(P);
    bool any_many = false;
    for (int64_t r = 0; r < P; ++r) {
      auto& anchor = group.anchors[r];
      const int64_t count = negatives_sought(anchor);
      if (count <= kFewThresholds) continue;
      any_many = true;
      set_reach(p * P + r, anchor);
      many[r] = {anchor.values.data(), nullptr, T(0), nullptr, T(0), Lane<T>(count)};
    }
    if (any_many) {
      group.y.resize(P * stride);
      each_block([&](int64_t begin, int64_t end) {
        kernels<T>().negatives(fine_, p, begin, end, many.data(), {nullptr, 0}, group.y.data() + begin * P, stride);
      });
    }
    for (int64_t r = 0; r < P; ++r) {
      if (r + 1 < P) prefetch(p * P + r + 1, group.anchors[r + 1], found);
      if (many[r].count) settle_many(p * P + r, group.y.data() + r * stride, group.anchors[r], group);
      else if (!group.anchors[r].positives.empty()) settle_few(p * P + r, group.anchors[r], found, group.candidates);
    }
  }

  // Decides between an anchor's candidates, exactly, and gives all of its pairs the y that they are measured by.
  void settle_few(int64_t i, typename Group<T>::Anchor& anchor, const Found& found,
                  std::vector<Measured>& candidates) const {
    constexpr double infinite = std::numeric_limits<double>::infinity();
    constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
    const int64_t count = negatives_sought(anchor), end = found.slots * found.stride;
    anchor.nearest.assign(count, T(0));
    anchor.nearest_index.assign(count, Lane<T>(-1));
    candidates.clear();
    for (int64_t k = found.start[i]; k < found.start[i + 1]; ++k) {
      const auto& [own, j, y] = found.candidates[k];
      candidates.push_back({kUnknown, r_.order[j], y, j});
    }
    // Of those whose y is `within`, the nearest or the farthest beyond that distance; nullptr: none.
    const auto choose = [&](bool farthest, double beyond, auto within) {
      return extreme(candidates, farthest, [&](Measured& c) {
        if (!within(c.y)) return false;
        if (std::isnan(c.distance)) c.distance = exact_distance(exact_, a_.order[i], c.original);
        return c.distance > beyond;
      });
    };
    std::optional<Ranking> ranking;
    if (found.crowded(i)) ranking.emplace(*this, i);
    for (int64_t t = 0; t < count; ++t) {
      double beyond = -infinite;
      if (negative_ == NegativeRule::SemiHard)
        beyond = exact_distance(exact_, a_.order[i], r_.order[anchor.positives[t].second]) + tie_;
      const T value = found.values[t * found.stride + i], floor = found.floor[t * found.stride + i];
      const T far = -found.floor[end + i];
      const Measured* chosen = ranking ? &ranking->nearest_beyond(beyond)
                                       : choose(false, beyond, [=](T y) { return y < value && y >= floor; });
      if (!chosen) chosen = choose(true, -infinite, [=](T y) { return y <= far; });
      if (!chosen) return;  // no negative is finite
      anchor.nearest[t] = y_of(chosen->distance);
      anchor.nearest_index[t] = chosen->index;
    }
    measure_positives(i, anchor);
  }

  // y that an anchor's positives are measured by: from the differences, but for anchors of very many positives.
  void measure_positives(int64_t i, typename Group<T>::Anchor& anchor) const {
    const bool few = int64_t(anchor.positives.size()) <= kFewThresholds;
    for (auto& [y, j] : anchor.positives) y = few ? measured(i, j) : with_root(y);
  }

  // The same of an anchor of many thresholds, from y of all of its negatives. What is in doubt is measured once, in the
  // order in which the rows lie in memory.
  void settle_many(int64_t i, const T* y, typename Group<T>::Anchor& anchor, Group<T>& group) const {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const int64_t count = int64_t(anchor.positives.size());
    Descending<T>& negatives = group.negatives;
    negatives.fill(y, r_.panels * panel(), anchor.values[count - 1]);
    group.wanted.assign(r_.count, 0);
    group.exact.resize(r_.count);
    group.doubts.clear();
    anchor.nearest.assign(count, T(0));
    anchor.nearest_index.assign(count, Lane<T>(-1));
    int64_t budget = 8 * count + negatives.size();  // of looks; where too many are in doubt, all are put in order
    for (int64_t t = 0; t < count && budget >= 0; ++t) {
      T floor = kNone, nearest = T(0);
      int64_t first = 0, last = 0;
      negatives.each_below(anchor.values[t], group.sort, [&](int64_t place) {
        const T here = negatives[place].first;
        if (here < floor || budget-- < 0) return false;
        if (first == last) last = place + 1;
        if (floor == kNone && here < anchor.certain[t])
          floor = T(here - T(rounding_error(fine_bound_, a_.norm[i], -2 * double(here))));
        first = place;
        nearest = here;
        return true;
      });
      if (last - first == 1 && nearest < anchor.certain[t]) {
        anchor.nearest[t] = with_root(nearest);
        anchor.nearest_index[t] = negatives[first].second;
        continue;
      }
      group.doubts.push_back({t, first, last});
      group.wanted[r_.order[anchor.positives[t].second]] = 1;
      for (int64_t place = first; place < last; ++place) group.wanted[r_.order[negatives[place].second]] = 1;
    }
    if (budget < 0) {
      rank_many(i, anchor);
    } else {
      measure_wanted(i, group);
      settle_doubts(i, y, anchor, group);
    }
    measure_positives(i, anchor);
  }

  void measure_wanted(int64_t i, Group<T>& group) const {
    auto& rows = group.rows;
    rows.clear();
    for (int64_t o = 0; o < r_.count; ++o)
      if (group.wanted[o]) rows.push_back(o);
    for (size_t k = 0; k < rows.size(); ++k) {
      if (k + 2 < rows.size()) prefetch(r_.place[rows[k + 2]]);
      group.exact[rows[k]] = exact_distance(exact_, a_.order[i], rows[k]);
    }
  }

  void settle_doubts(int64_t i, const T* y, typename Group<T>::Anchor& anchor, Group<T>& group) const {
    std::optional<Measured> farthest;
    for (const auto& [t, first, last] : group.doubts) {
      const double beyond = group.exact[r_.order[anchor.positives[t].second]] + tie_;
      auto& candidates = group.candidates;
      candidates.clear();
      for (int64_t place = first; place < last; ++place) {
        const auto& [at, j] = group.negatives[place];
        const int64_t o = r_.order[j];
        if (group.exact[o] > beyond) candidates.push_back({group.exact[o], o, at, j});
      }
      if (candidates.empty()) {
        if (!farthest && !(farthest = farthest_of(i, y))) continue;  // no negative is finite
        candidates.push_back(*farthest);
      }
      const Measured& chosen = extreme(candidates, false);
      anchor.nearest[t] = y_of(chosen.distance);
      anchor.nearest_index[t] = chosen.index;
    }
  }

  void rank_many(int64_t i, typename Group<T>::Anchor& anchor) const {
    Ranking ranking(*this, i);
    for (size_t t = 0; t < anchor.positives.size(); ++t) {
      const double beyond = ranking.distance_of(r_.order[anchor.positives[t].second]) + tie_;
      const Measured& chosen = ranking.nearest_beyond(beyond);
      anchor.nearest[t] = y_of(chosen.distance);
      anchor.nearest_index[t] = chosen.index;
    }
  }

  // The farthest negative, from y of all.
  std::optional<Measured> farthest_of(int64_t i, const T* y) const {
    T lowest = std::numeric_limits<T>::infinity();
    for (int64_t j = 0; j < r_.count; ++j) lowest = y[j] < lowest ? y[j] : lowest;
    const T most = T(lowest + T(rounding_error(fine_bound_, a_.norm[i], -2 * double(lowest))));
    std::vector<Measured> candidates;
    for (int64_t j = 0; j < r_.count; ++j)
      if (y[j] <= most) candidates.push_back({0, r_.order[j], y[j], Lane<T>(j)});
    if (candidates.empty()) return std::nullopt;
    measure_all(i, candidates);
    return extreme(candidates, true);
  }

  // The rows that settle_few() will measure: they lie anywhere, and waiting for each would take most of the time.
  void prefetch(int64_t i, const typename Group<T>::Anchor& anchor, const Found& found) const {
    if (anchor.positives.size() > kFewThresholds) return;
    for (const auto& positive : anchor.positives) prefetch(positive.second);
    for (int64_t k = found.start[i]; k < found.start[i + 1]; ++k) prefetch(found.candidates[k].reference);
  }
  void prefetch(int64_t j) const {
    constexpr int64_t kLine = 64 / sizeof(T), kMost = 1024;
    const T* row = r_.rows.row(r_.order[j]);
    for (int64_t k = 0; k < std::min(r_.depth, kMost); k += kLine) __builtin_prefetch(row + k);
  }

  void measure_all(int64_t i, std::vector<Measured>& candidates) const {
    for (Measured& c : candidates) c.distance = exact_distance(exact_, a_.order[i], c.original);
  }

  const std::vector<int64_t>& first_equal() const {
    std::call_once(equal_once_, [&] { first_equal_ = first_equal_rows(r_); });
    return first_equal_;
  }

  // All negatives of an anchor in order of their exact distance: for those whose negatives are so close to each other
  // that the candidates are too many.
  class Ranking {
   public:
    Ranking(const Mined& mined, int64_t i)
        : mined_(mined),
          first_equal_(mined.first_equal()),
          anchor_(mined.a_.order[i]),
          known_(mined.r_.count, std::numeric_limits<double>::quiet_NaN()) {
      const Side<T>& r = mined.r_;
      ranked_.reserve(r.count);
      for (int64_t original = 0; original < r.count; ++original) {
        const int64_t j = r.place[original];
        if (r.group.get()[j] == kNoGroup || r.group.get()[j] == mined.a_.klass[i]) continue;
        ranked_.push_back({distance_of(original), original, T(0), Lane<T>(j)});
      }
      const auto before = [](const Measured& p, const Measured& q) { return p.distance < q.distance; };
      if (!std::is_sorted(ranked_.begin(), ranked_.end(), before))
        std::stable_sort(ranked_.begin(), ranked_.end(), before);
      find_first_of_ties();
    }

    // Of the anchor and a reference.
    double distance_of(int64_t original) {
      double& distance = known_[first_equal_[original]];
      if (std::isnan(distance)) distance = exact_distance(mined_.exact_, anchor_, original);
      return distance;
    }

    // The nearest whose distance is more than that; or else the farthest.
    const Measured& nearest_beyond(double distance) const {
      const auto found = std::upper_bound(ranked_.begin(), ranked_.end(), distance,
                                          [](double d, const Measured& m) { return d < m.distance; });
      return found != ranked_.end() ? ranked_[first_[found - ranked_.begin()]] : ranked_[farthest_];
    }

   private:
    // For each place the lowest original of those from there on that tie with it: the minimum of a sliding window.
    void find_first_of_ties() {
      first_.resize(ranked_.size());
      std::deque<int64_t> window;  // places, originals ascending from the back to the front
      for (int64_t k = int64_t(ranked_.size()) - 1; k >= 0; --k) {
        while (!window.empty() && ranked_[window.back()].original > ranked_[k].original) window.pop_back();
        window.push_back(k);
        while (ranked_[window.front()].distance > ranked_[k].distance + mined_.tie_) window.pop_front();
        first_[k] = window.front();
      }
      farthest_ = int64_t(ranked_.size()) - 1;
      for (int64_t k = farthest_ - 1; k >= 0 && ranked_[k].distance >= ranked_.back().distance - mined_.tie_; --k)
        if (ranked_[k].original < ranked_[farthest_].original) farthest_ = k;
    }

    const Mined& mined_;
    const std::vector<int64_t>& first_equal_;
    int64_t anchor_;
    std::vector<double> known_;  // of the first of equal rows
    std::vector<Measured> ranked_;
    std::vector<int64_t> first_;
    int64_t farthest_ = -1;
  };

  // y of a distance as exact_distance() gives it.
  T y_of(double distance) const {
    if (problem_.cosine) return T(-distance);
    return pairing_.root ? T(-std::sqrt(distance) * problem_.scale)
                         : T(-distance * problem_.scale * problem_.scale / 2);
  }

  // y as distances are measured, from that of squares.
  T with_root(T y) const { return pairing_.root ? -std::sqrt(std::max(T(0), -2 * y)) : y; }

  // The same from what the forward left in `saved`.
  void recall_negatives(int64_t p, Group<T>& group, const int32_t* saved, int64_t width) const {
    for (int64_t r = 0; r < panel(); ++r) {
      auto& anchor = group.anchors[r];
      const int64_t i = p * panel() + r, count = negatives_sought(anchor);
      anchor.nearest.resize(count);
      anchor.nearest_index.resize(count);
      for (int64_t t = 0; t < count; ++t) anchor.nearest_index[t] = Lane<T>(saved[i * width + t]);
      for (const auto& positive : anchor.positives) prefetch(positive.second);
      for (int64_t t = 0; t < count; ++t) {
        if (distances_fit(width)) std::memcpy(&anchor.nearest[t], saved_distance(saved, i, t, width), sizeof(T));
        else anchor.nearest[t] = measured(i, anchor.nearest_index[t]);
      }
      measure_positives(i, anchor);
    }
  }

  // f(anchor, rank of the positive, positive, negative), after choose_negatives.
  template <typename F>
  void each_triplet(int64_t p, const Group<T>& group, F f) const {
    for (int64_t r = 0; r < panel(); ++r) {
      const auto& anchor = group.anchors[r];
      for (size_t t = 0; t < anchor.positives.size(); ++t) {
        const size_t n = negative_ == NegativeRule::Hard ? 0 : t;
        if (anchor.nearest_index[n] < 0) continue;  // no negative is finite
        f(p * panel() + r, int64_t(t), Taken<T>{anchor.positives[t].first, anchor.positives[t].second},
          Taken<T>{anchor.nearest[n], anchor.nearest_index[n]});
      }
    }
  }

  // What a distance's weight is in the product: that of a root is divided by the root, whose derivative at 0 is 0.
  T pull_of(T weight, T y) const { return !pairing_.root ? weight : y < 0 ? weight / -y : weight * T(0); }

  // y of a close pair. What is left of a difference of packed rows, which the centre has rounded, may be rounding.
  T separation(const Strip& strip, int64_t i, int64_t j) const {
    if (strip.equal->anchors()[i] == strip.equal->references()[j]) return 0;
    constexpr bool narrow = std::is_same_v<T, float>;  // whose squares are in the range of float64, scaled or not
    const double before = narrow ? 1 : problem_.scale, after = narrow ? problem_.scale : 1;
    const T *x = a_.rows.row(a_.order[i]), *r = r_.rows.row(r_.order[j]);
    return T(-std::sqrt(kernels<T>().exact_square(x, r, a_.depth, before, before)) * after);
  }

  // The weights of a panel of anchors.
  void weigh(int64_t p, Group<T>& group, const Weight<T>& weight, const int32_t* saved, int64_t width,
             const Strip& strip, const Found& found, std::vector<Pair<T>>& pairs) const {
    const int64_t P = panel(), tile_rows = kernels<T>().tile_rows, tile = P * tile_rows;
    const uint32_t* marks = marks_fit(width) ? reinterpret_cast<const uint32_t*>(saved) : nullptr;
    if (negative_ == NegativeRule::All && marks) {
      // Of a batch that is not a whole number of panels, the last has groups of rows that there is no room for.
      const int64_t groups = P / tile_rows, rows = (a_.count + tile_rows - 1) / tile_rows;
      const uint32_t *first = marks + p * groups * words(), *last = marks + std::min(rows, (p + 1) * groups) * words();
      if (std::all_of(first, last, [](uint32_t bits) { return bits == 0; })) return;  // nothing is active
    }
    choose_positives(p, group);
    std::vector<T> own(P);
    for (int64_t r = 0; r < P; ++r)
      if (takes_part(p * P + r)) own[r] = weight.of(a_.order[p * P + r]);
    const auto at = [&](int64_t r, int64_t j) -> T& {
      const int64_t g = r / tile_rows, panel = j / P;
      uint32_t& bits = strip.marks.bits[g * words() + panel / 32];
      T* here = strip.weights.tiles + (g * r_.panels + panel) * tile;
      if (!(bits >> (panel % 32) & 1)) std::fill_n(here, tile, T(0));
      bits |= uint32_t(1) << (panel % 32);
      return here[r % tile_rows * P + j % P];
    };
    const auto add = [&](int64_t r, int64_t j, T weight, T y, bool alone) {
      const int64_t i = p * P + r;
      const bool close = !alone && pairing_.root && y * y < T(2 * kClose) * (a_.bias.get()[i] + r_.bias.get()[j]);
      const T pull = pull_of(weight, close ? separation(strip, i, j) : y);
      if (!alone && !close) at(r, j) += pull;
      else if (pull != 0) pairs.push_back({i, j, pull});
    };
    if (negative_ == NegativeRule::All) {
      weigh_all(p, group, own, marks, strip, pairs);
      for (int64_t r = 0; r < P; ++r) {
        const auto& anchor = group.anchors[r];
        if (anchor.positives.empty()) continue;
        // Side by side first: in order of distance, they would go all over the tiles.
        const int64_t begin = class_begin_[p * P + r], end = class_end_[p * P + r];
        group.row.assign(end - begin, T(0));
        for (size_t t = 0; t < anchor.positives.size(); ++t) {
          const auto& [y, j] = anchor.positives[t];
          if (anchor.pulls[t] == 0) continue;
          const T weight = own[r] * T(anchor.pulls[t]);
          if (pairing_.root) add(r, j, weight, y, false);
          else group.row[j - begin] = weight;
        }
        for (int64_t from = begin, to; from < end; from = to) {
          to = std::min(end, (from / P + 1) * P);
          const T *weights = group.row.data() + from - begin, *stop = group.row.data() + to - begin;
          if (std::all_of(weights, stop, [](T weight) { return weight == 0; })) continue;
          for (T* tile = &at(r, from); weights < stop;) *tile++ += *weights++;
        }
      }
      return;
    }
    if (negatives_fit(width)) recall_negatives(p, group, saved, width);
    else choose_negatives(p, group, found);
    // Many positives may have one negative, and their slopes be equal.
    struct {
      int64_t r;
      Taken<T> negative;
      double slopes;
    } same{0, {T(0), Lane<T>(-1)}, 0};
    const auto add_negative = [&] {
      const bool few = group.anchors[same.r].positives.size() <= kFewThresholds;  // too few to fill tiles
      if (same.slopes != 0) add(same.r, same.negative.index, T(-same.slopes * own[same.r]), same.negative.y, few);
    };
    each_triplet(p, group, [&](int64_t i, int64_t, Taken<T> pos, Taken<T> neg) {
      const T slope = triplet_slope_of(excess_of(i, pos, neg), measure_);
      if (slope == 0) return;
      const int64_t r = i - p * P;
      add(r, pos.index, slope * own[r], pos.y, group.anchors[r].positives.size() <= kFewThresholds);
      if (r != same.r || neg.index != same.negative.index) {
        add_negative();
        same = {r, neg, 0};
      }
      same.slopes += slope;
    });
    add_negative();
  }

  // Those of all negatives, and what pulls at each positive.
  void weigh_all(int64_t p, Group<T>& group, const std::vector<T>& own, const uint32_t* saved, const Strip& strip,
                 std::vector<Pair<T>>& close) const {
    const int64_t P = panel(), tile_rows = kernels<T>().tile_rows, groups = P / tile_rows;
    set_margins(group);
    std::vector<double*> pulls(P);
    for (int64_t r = 0; r < P; ++r) {
      auto& anchor = group.anchors[r];
      anchor.pulls.assign(anchor.positives.size(), 0);
      pulls[r] = anchor.pulls.data();
    }
    for (int64_t g = 0; g < groups; ++g) {
      bool live = false;
      for (int64_t r = g * tile_rows; r < (g + 1) * tile_rows; ++r) live |= !group.anchors[r].positives.empty();
      if (!live) continue;
      uint32_t* bits = strip.marks.bits + g * words();
      if (saved) std::copy_n(saved + (p * groups + g) * words(), words(), bits);
      else std::fill_n(bits, words(), ~uint32_t(0));
    }
    Pairs<T> found{nullptr, 0, 0, nullptr, nullptr};
    if (pairing_.root) {
      if (!group.close_room) {
        group.close_room = std::max(kCloseRoom, P * r_.count / kCloseShare);
        group.close = Buffer<Pair<T>>(group.close_room);
      }
      found = {group.close.get(), 0, group.close_room, strip.equal->anchors(), strip.equal->references()};
    }
    if (measure_.soft_margin) {
      // Row by row, and those of other anchors stay as they are.
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t panel = 0; panel < r_.panels; ++panel)
          if (strip.marks.bits[g * words() + panel / 32] >> (panel % 32) & 1)
            std::fill_n(strip.weights.tiles + (g * r_.panels + panel) * tile_rows * P, tile_rows * P, T(0));
      each_soft_row(p, group, strip.marks,
                    [&](int64_t r, const auto& soft, int64_t begin, int64_t end, const T* y, auto room) {
                      kernels<T>().soft_weigh(pairing_, soft, p * P + r, begin, end, y, room, own[r], pulls[r],
                                              strip.marks, strip.weights, &found);
                    });
    } else {
      each_block([&](int64_t begin, int64_t end) {
        kernels<T>().weigh(pairing_, p, begin, end, group.thresholds.data(), own.data(), pulls.data(), strip.marks,
                           strip.weights, &found);
      });
    }
    close.assign(found.data, found.data + found.count);
    for (Pair<T>& pair : close) pair.weight = pull_of(pair.weight, separation(strip, pair.i, pair.j));
    // Where thresholds are searched, a negative was counted for the last one that it passes.
    for (auto& anchor : group.anchors)
      if (!measure_.soft_margin && anchor.pulls.size() > kFewThresholds)
        for (size_t t = anchor.pulls.size() - 1; t > 0; --t) anchor.pulls[t - 1] += anchor.pulls[t];
  }

  // The gradient of one side.
  void write(const Side<T>& side, const T* rows, const Pulled& pulled, int64_t width, T* grad) const {
    const T factor = problem_.cosine || pairing_.root ? T(1) : T(2 / problem_.scale);
    at::parallel_for(0, side.count, std::max<int64_t>(1, (1 << 15) / (width + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t o = side.order[i];
        const T *x = rows + i * width, *pull = pulled.rows.get() + i * width;
        const double sum = pulled.sums[i];
        T* g = grad + o * side.depth;
        for (int64_t k = 0; k < side.depth; ++k) g[k] = factor * T(sum * x[k] + pull[k]);
        if (!problem_.cosine || !side.finite[o]) continue;
        // The part across the unit row, over the norm; below the floor the norm is a constant.
        const T scale = T(side.scale[o]);
        const T* source = side.rows.row(o);
        T along = T(sum + pulled.alone[i]);
        if (side.lack[o] == 0) {
          along = 0;
          for (int64_t k = 0; k < side.depth; ++k) along += g[k] * source[k] * scale;
        }
        for (int64_t k = 0; k < side.depth; ++k) g[k] = scale * (g[k] - along * source[k] * scale);
      }
    });
  }

  const Restriction restriction_;
  Problem<T> problem_;
  const Side<T>&a_, &r_;
  Pairing<T> pairing_, fine_;  // as distances are measured; and without a root, as they are compared
  RoundingBound bound_, fine_bound_;
  Exact<T> exact_;
  double tie_;
  mutable std::once_flag equal_once_;
  mutable std::vector<int64_t> first_equal_;
  PositiveRule positive_;
  NegativeRule negative_;
  Measure measure_;
  double largest_;
  int64_t not_finite_;                            // references
  T farthest_;                                    // y from which on a distance is infinite
  bool may_overflow_;                             // whether one may be
  std::vector<uint8_t> overflows_;                // see find_overflows(); packed anchors; empty: none
  std::vector<int64_t> class_begin_, class_end_;  // of an anchor's class among the packed references
  int64_t most_ = 0;                              // positives taken of an anchor
  double unit_[2] = {1, 1};                       // d is -unit[0] unit[1] y: the product may be beyond the range
  int64_t block_;
  bool serial_;
};

// Calls f(what is mined from both sides of a call), in the accumulation type or, if that must be, in float64.
template <typename T, typename F>
void with_mined(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
                const OptionalTensor& reference_labels, std::optional<int64_t> offset, const Restriction& restriction,
                std::string_view positive, std::string_view negative, const Measure& measure, F f,
                double largest = std::numeric_limits<T>::max()) {
  check_rows(embeddings.size(0), references ? references->size(0) : 0);
  const at::Tensor x = as_rows(embeddings), y = labels.contiguous();
  const at::Tensor r = references ? as_rows(*references) : x, z = references ? reference_labels->contiguous() : y;
  Side<T> anchors = side_of<T>(x, y);
  std::optional<Side<T>> others;
  if (references) others = side_of<T>(r, z);
  const Mined<T> mined(anchors, others ? &*others : nullptr, references ? offset : 0, restriction,
                       parse_positive(positive), parse_negative(negative), measure, largest);
  if (!mined.wants_float64()) return f(mined);
  OptionalTensor wide;
  if (references) wide = references->to(at::kDouble);
  with_mined<double>(embeddings.to(at::kDouble), labels, wide, reference_labels, offset, restriction, positive,
                     negative, measure, f, largest);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> select_pair_restricted(const at::Tensor& embeddings, const at::Tensor& labels,
                                                          const OptionalTensor& references,
                                                          const OptionalTensor& reference_labels,
                                                          std::optional<int64_t> reference_offset,
                                                          const Restriction& restriction, std::string_view distance,
                                                          std::string_view positive, std::string_view negative) {
  const auto options = at::TensorOptions(at::kLong);
  at::Tensor p = at::full({embeddings.size(0)}, -1, options), n = at::full({embeddings.size(0)}, -1, options);
  if (embeddings.size(0) == 0) return {p, n};
  dispatch(embeddings, [&](auto zero) {
    const Measure measure{0, 2, 0, parse_distance(distance), false, false};
    with_mined<decltype(zero)>(
        embeddings, labels, references, reference_labels, reference_offset, restriction, positive, negative, measure,
        [&](const auto& mined) { mined.select(p.mutable_data_ptr<int64_t>(), n.mutable_data_ptr<int64_t>()); });
  });
  return {p, n};
}

Loss mined_triplet_loss_restricted(const at::Tensor& embeddings, const at::Tensor& labels,
                                   const OptionalTensor& references, const OptionalTensor& reference_labels,
                                   std::optional<int64_t> reference_offset, const Restriction& restriction,
                                   std::string_view positive, std::string_view negative, double margin,
                                   std::string_view distance, bool swap, bool soft_margin, std::string_view reduction) {
  const Measure measure{margin, 2, 0, parse_distance(distance), swap, soft_margin};
  return dispatch(embeddings, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = embeddings.size(0), total = references ? references->size(0) : count;
    const int64_t width = saved_width(embeddings, total);
    const at::Tensor saved = at::zeros({count, width}, at::TensorOptions(at::kInt));
    const at::Tensor stats = at::empty({kStats}, at::TensorOptions(at::kDouble));
    const bool none = parse_reduction(reduction) == Reduction::None;
    const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
    const at::Tensor loss = none ? at::empty({count}, options) : at::empty({}, options);
    double sum[kSums] = {}, anchors = 0;
    if (count > 0)
      with_mined<T>(embeddings, labels, references, reference_labels, reference_offset, restriction, positive, negative,
                    measure, [&](const auto& mined) {
                      const auto sums =
                          swap ? mined.forward_swapped() : mined.forward(saved.mutable_data_ptr<int32_t>(), width);
                      for (int64_t i = 0; i < count; ++i) {
                        anchors += sums.triplets[i] > 0;
                        sum[kSumTriplets] += double(sums.triplets[i]);
                        sum[kSumActive] += double(sums.active[i]);
                        sum[kSumLoss] += sums.loss[i];
                        sum[kSumPositive] += sums.positive[i];
                        sum[kSumNegative] += sums.negative[i];
                        if (none) loss.mutable_data_ptr<T>()[i] = T(sums.loss[i]);
                      }
                    });
    double* s = stats.mutable_data_ptr<double>();
    write_stats(s, anchors, sum[kSumTriplets], sum[kSumActive], sum[kSumPositive], sum[kSumNegative]);
    if (!none) *loss.mutable_data_ptr<T>() = T(sum[kSumLoss] / divisor_of(s, parse_reduction(reduction)));
    return Loss(loss, saved, stats);
  });
}

std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_backward_restricted(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset, const Restriction& restriction,
    const at::Tensor& saved, const at::Tensor& stats, std::string_view positive, std::string_view negative,
    double margin, std::string_view distance, bool swap, bool soft_margin, std::string_view reduction) {
  const Measure measure{margin, 2, 0, parse_distance(distance), swap, soft_margin};
  return dispatch(embeddings, [&](auto zero) {
    using T = decltype(zero);
    const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
    at::Tensor own = at::zeros(embeddings.sizes(), options);
    at::Tensor other = at::zeros(references ? references->sizes() : at::IntArrayRef{0}, options);
    if (embeddings.size(0) > 0)
      with_mined<T>(embeddings, labels, references, reference_labels, reference_offset, restriction, positive, negative,
                    measure, [&](const auto& mined) {
                      using M = typename std::decay_t<decltype(mined)>::Scalar;
                      constexpr auto type = c10::CppTypeToScalarType<M>::value;
                      own = own.to(type);
                      other = other.to(type);
                      const Weight<M> weight(grad, stats, parse_reduction(reduction));
                      M *x = own.mutable_data_ptr<M>(), *r = other.mutable_data_ptr<M>();
                      if (swap) mined.backward_swapped(weight, x, r);
                      else mined.backward(weight, saved.const_data_ptr<int32_t>(), saved.size(1), x, r);
                    });
    return std::make_tuple(own.to(embeddings.scalar_type()), other.to(embeddings.scalar_type()));
  });
}

std::tuple<at::Tensor, at::Tensor> select_pair_cpu(const at::Tensor& embeddings, const at::Tensor& labels,
                                                   const OptionalTensor& references,
                                                   const OptionalTensor& reference_labels,
                                                   std::optional<int64_t> reference_offset, std::string_view distance,
                                                   std::string_view positive, std::string_view negative) {
  return select_pair_restricted(embeddings, labels, references, reference_labels, reference_offset, {}, distance,
                                positive, negative);
}

Loss mined_triplet_loss_cpu(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
                            const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset,
                            std::string_view positive, std::string_view negative, double margin,
                            std::string_view distance, bool swap, bool soft_margin, std::string_view reduction) {
  return mined_triplet_loss_restricted(embeddings, labels, references, reference_labels, reference_offset, {}, positive,
                                       negative, margin, distance, swap, soft_margin, reduction);
}

std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_backward_cpu(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset, const at::Tensor& saved,
    const at::Tensor& stats, std::string_view positive, std::string_view negative, double margin,
    std::string_view distance, bool swap, bool soft_margin, std::string_view reduction) {
  return mined_triplet_loss_backward_restricted(grad, embeddings, labels, references, reference_labels,
                                                reference_offset, {}, saved, stats, positive, negative, margin,
                                                distance, swap, soft_margin, reduction);
}

}  // namespace triplet_ext
