// Batch-hard selection. Three steps: every tile of the Gram matrix once, keeping the two best values of each
// row; a certificate that says for which rows rounding cannot have changed the winner; and for the others the
// same tiles again, measuring in float64 what lies within rounding of the best. The result is therefore what
// float64 arithmetic would choose, at the price of float32.
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../ops.h"
#include "convert.h"

namespace triplet_ext {
namespace {

constexpr int64_t kCentreRows = 64;          // a sample is enough: a centre need not be the mean
constexpr int64_t kBlockBytes = 192 << 10;   // of packed columns, to stay in the second-level cache
constexpr double kSerialProducts = 4 << 20;  // below this, starting threads costs more than it saves

// Row numbers by label, stable. Radix sort on the bytes in which the labels differ at all.
std::vector<int64_t> sorted_by(const int64_t* labels, int64_t count, uint64_t differing) {
  std::vector<int64_t> order(count), next(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  for (int shift = 0; shift < 64; shift += 8) {
    if (!(differing >> shift & 0xff)) continue;
    int64_t start[257] = {};
    for (int64_t i = 0; i < count; ++i) ++start[(uint64_t(labels[i]) >> shift & 0xff) + 1];
    for (int b = 0; b < 256; ++b) start[b + 1] += start[b];
    for (int64_t i : order) next[start[uint64_t(labels[i]) >> shift & 0xff]++] = i;
    order.swap(next);
  }
  return order;
}

uint64_t differing_bits(const int64_t* labels, int64_t count, int64_t like) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= uint64_t(labels[i] ^ like);
  return bits;
}

// Uninitialised memory that vectors can be loaded from.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0)
      : data_(static_cast<T*>(::operator new[](sizeof(T) * size, std::align_val_t(kAlignment)))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<T, Free> data_;
};

// One side of the comparison, anchors or references.
template <typename T>
struct Side {
  Rows<T> rows;
  const int64_t* labels;
  int64_t count, depth, panels;
  std::vector<int64_t> order;       // packed -> original
  std::vector<int64_t> place;       // original -> packed
  std::vector<Lane<T>> klass;       // packed -> class
  std::vector<uint8_t> finite;      // original
  std::vector<double> scale, lack;  // original; of the cosine distance
  std::vector<double> norm;         // packed, of the row as packed
  Buffer<T> data, bias;             // see Panels
  Buffer<Lane<T>> group;
  std::vector<Lane<T>> first, last;

  Side(Rows<T> rows, const int64_t* labels, int64_t count, int64_t depth)
      : rows(rows), labels(labels), count(count), depth(depth), finite(count) {
    panels = (count + kernels<T>().panel - 1) / kernels<T>().panel;
  }

  // Looks at every row; returns the largest |x| of those that are finite.
  T inspect(bool cosine) {
    if (cosine) {
      scale.resize(count);
      lack.resize(count);
    }
    const int64_t step = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, depth));
    std::vector<T> largest((count + step - 1) / step);
    at::parallel_for(0, int64_t(largest.size()), 4, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t from = chunk * step, to = std::min(count, from + step);
        const Rows<T> here{rows.row(from), rows.stride};
        largest[chunk] = kernels<T>().inspect(here, to - from, depth, &finite[from]);
        for (int64_t i = from; cosine && i < to; ++i) {
          const double s = kernels<T>().square(rows.row(i), depth), floor = kCosineFloor * kCosineFloor;
          finite[i] = finite[i] && std::isfinite(s);
          scale[i] = 1 / std::sqrt(std::max(s, floor));
          lack[i] = std::max(0.0, 1 - s / floor);
        }
      }
    });
    return largest.empty() ? T(0) : *std::max_element(largest.begin(), largest.end());
  }

  double scale_of(int64_t i, double common) const { return scale.empty() ? common : scale[i]; }

  std::vector<T> centre(double common) const {
    std::vector<double> total(depth);
    int64_t taken = 0;
    const int64_t step = (count + kCentreRows - 1) / kCentreRows;
    for (int64_t i = 0; i < count; i += std::max<int64_t>(1, step)) {
      if (!finite[i]) continue;
      ++taken;
      const double factor = scale_of(i, common);
      for (int64_t k = 0; k < depth; ++k) total[k] += rows.row(i)[k] * factor;
    }
    std::vector<T> mean(depth);
    for (int64_t k = 0; k < depth && taken; ++k) mean[k] = T(total[k] / double(taken));
    return mean;
  }

  void pack_panel(const int64_t* packed, int64_t n, double common, const std::vector<T>& centre, T* out, T* bias,
                  double* squares) const {
    const int P = kernels<T>().panel;
    std::vector<const T*> row(P, nullptr);
    std::vector<T> factor(P, T(0));
    for (int r = 0; r < P; ++r) bias[r] = T(kHidden);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t o = order[packed[r]];
      if (!finite[o]) continue;
      row[r] = rows.row(o);
      factor[r] = T(scale_of(o, common));
      bias[r] = lack.empty() ? T(0) : T(lack[o] / 2);
    }
    kernels<T>().pack(row.data(), factor.data(), centre.data(), depth, out, squares);
    for (int r = 0; r < P; ++r) bias[r] += T(squares[r] / 2);
  }

  void pack(double common, const std::vector<T>& centre) {
    const int64_t P = kernels<T>().panel;
    data = Buffer<T>(panels * P * depth);
    bias = Buffer<T>(panels * P);
    group = Buffer<Lane<T>>(panels * P);
    norm.resize(panels * P);
    first.assign(panels, std::numeric_limits<Lane<T>>::max());
    last.assign(panels, Lane<T>(kNoGroup));
    at::parallel_for(0, panels, std::max<int64_t>(1, (1 << 15) / (P * (depth + 1))), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> packed(P);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t from = panel * P, n = std::min(P, count - from);
        for (int64_t r = 0; r < n; ++r) packed[r] = from + r;
        double* squares = norm.data() + from;
        pack_panel(packed.data(), n, common, centre, data.get() + from * depth, bias.get() + from, squares);
        for (int64_t r = 0; r < P; ++r) {
          const bool real = r < n && finite[order[from + r]];
          const Lane<T> g = real ? klass[from + r] : Lane<T>(kNoGroup);
          group.get()[from + r] = g;
          if (real) {
            first[panel] = std::min(first[panel], g);
            last[panel] = std::max(last[panel], g);
          }
          squares[r] = std::sqrt(squares[r]);
        }
      }
    });
  }

  Panels<T> view() const { return {data.get(), bias.get(), group.get(), first.data(), last.data(), depth}; }
};

// Sorts both sides and numbers their classes alike.
template <typename T>
void classify(Side<T>& a, Side<T>* other) {
  const int64_t like = a.count ? a.labels[0] : other && other->count ? other->labels[0] : 0;
  uint64_t bits = differing_bits(a.labels, a.count, like);
  if (other) bits |= differing_bits(other->labels, other->count, like);
  for (Side<T>* side : {&a, other}) {
    if (!side) continue;
    side->order = sorted_by(side->labels, side->count, bits);
    side->place.resize(side->count);
    for (int64_t i = 0; i < side->count; ++i) side->place[side->order[i]] = i;
    side->klass.resize(side->count);
  }
  // The order is that of the unsigned value; constant bytes do not matter to it.
  Lane<T> rank = -1;
  int64_t i = 0, j = 0;
  const int64_t m = other ? other->count : 0;
  const auto key = [](const Side<T>& side, int64_t packed) { return uint64_t(side.labels[side.order[packed]]); };
  while (i < a.count || j < m) {
    const uint64_t next = i == a.count ? key(*other, j) : j == m ? key(a, i) : std::min(key(a, i), key(*other, j));
    ++rank;
    while (i < a.count && key(a, i) == next) a.klass[i++] = rank;
    while (j < m && key(*other, j) == next) other->klass[j++] = rank;
  }
}

// Top2 of every packed row.
template <typename T>
struct Best {
  int64_t size;
  Buffer<T> values;
  Buffer<Lane<T>> index;
  explicit Best(int64_t size = 0) : size(size), values(2 * size), index(size) {
    std::fill_n(values.get(), 2 * size, T(kNothing));
    std::fill_n(index.get(), size, Lane<T>(-1));
  }
  Top2<T> view() const { return {values.get(), values.get() + size, index.get()}; }
  void merge(const Best& other) {
    const Top2<T> top = view(), more = other.view();
    for (int64_t i = 0; i < size; ++i) {
      if (more.best[i] > top.best[i]) {
        top.second[i] = std::max(top.best[i], more.second[i]);
        top.best[i] = more.best[i];
        top.index[i] = more.index[i];
      } else {
        top.second[i] = std::max(top.second[i], more.best[i]);
      }
    }
  }
};

// How far a computed squared distance may be from the true one.
struct RoundingBound {
  double relative, absolute, unit;
  bool cosine, hopeless;

  // Of a distance s from a row of that norm; the other norm is at most norm + sqrt(s).
  double operator()(double norm, double s) const {
    if (hopeless) return std::numeric_limits<double>::infinity();
    const double root = std::sqrt(std::max(0.0, s)), reach = 2 * norm + root;
    // Scaling a row to unit length rounds it in proportion to its length, not to its distance from the centre;
    // and what ties with the best must be looked at, too.
    const double scaling = cosine ? unit * (10 * root + 32 * unit) + 2 * kCosineTie : 0;
    return 1.1 * (relative * reach * reach + scaling) + absolute;
  }
};

template <typename T>
RoundingBound rounding_bound(int64_t depth, bool cosine, bool hopeless) {
  const double unit = std::numeric_limits<T>::epsilon() / 2;
  // The inner product is one chain of `depth` sums: 2 (depth + 1) |x||y| <= (depth + 1) / 2 (|x| + |y|)^2 units.
  // The rest is for the biases, the final subtraction and the centring.
  return {(double(depth) / 2 + 16) * unit, 4 * double(depth + 1) * std::numeric_limits<T>::min(), unit, cosine,
          hopeless};
}

// Rows that are not finite come before all others: an anchor takes the first of them that is its positive or
// its negative; an anchor that is such a row itself takes its first positive and its first negative.
template <typename T>
void select_not_finite(const Side<T>& a, const Side<T>& r, const std::vector<int64_t>& self, int64_t* positive,
                       int64_t* negative) {
  const auto all_finite = [](const Side<T>& s) {
    return std::find(s.finite.begin(), s.finite.end(), uint8_t(0)) == s.finite.end();
  };
  if (all_finite(a) && all_finite(r)) return;
  // The first reference at all, and the first of another class than that; the same of those not finite.
  struct Leaders {
    int64_t first = -1, other = -1;
    int64_t outside(const Side<T>& r, int64_t label) const {
      return first >= 0 && r.labels[first] != label ? first : other;
    }
  } any, bad;
  for (int64_t j = 0; j < r.count; ++j) {
    for (Leaders* l : {&any, &bad}) {
      if (l == &bad && r.finite[j]) continue;
      if (l->first < 0) l->first = j;
      else if (l->other < 0 && r.labels[j] != r.labels[l->first]) l->other = j;
    }
  }
  // Classes are segments of both orders, original order within each.
  for (int64_t i = 0, begin = 0; i < a.count;) {
    int64_t i_end = i;
    while (i_end < a.count && a.klass[i_end] == a.klass[i]) ++i_end;
    while (begin < r.count && r.klass[begin] < a.klass[i]) ++begin;
    int64_t end = begin;
    int64_t first_bad[2] = {-1, -1};  // two, since one may be the anchor itself
    for (; end < r.count && r.klass[end] == a.klass[i]; ++end) {
      const int64_t j = r.order[end];
      if (r.finite[j]) continue;
      if (first_bad[0] < 0) first_bad[0] = j;
      else if (first_bad[1] < 0) first_bad[1] = j;
    }
    for (; i < i_end; ++i) {
      const int64_t o = a.order[i], own = self[o];
      int64_t p = first_bad[0] != own ? first_bad[0] : first_bad[1];
      int64_t n = bad.outside(r, a.labels[o]);
      if (!a.finite[o]) {
        p = begin < end ? r.order[begin] : -1;
        if (p == own) p = begin + 1 < end ? r.order[begin + 1] : -1;
        n = any.outside(r, a.labels[o]);
      }
      if (p >= 0) positive[o] = p;
      if (n >= 0) negative[o] = n;
    }
    begin = end;
  }
}

// What the steps of a selection share.
template <typename T>
struct Problem {
  const Side<T>& a;  // anchors
  const Side<T>& r;  // references; the anchors themselves if symmetric
  bool symmetric, cosine;
  double scale;  // common to all rows, unless the distance is the cosine
  std::vector<T> centre;
  std::vector<int64_t> self;         // of an anchor among the references, or -1: original -> original
  std::vector<Lane<T>> packed_self;  // packed -> packed
};

template <typename T>
struct Scan {
  Best<T> nearest, farthest;
};

// The two best of each anchor, from every tile once.
template <typename T>
Scan<T> scan(const Problem<T>& problem) {
  const Side<T>&a = problem.a, &r = problem.r;
  const int64_t P = kernels<T>().panel;
  const double products = double(a.count) * double(r.count) * double(a.depth + 16) / (problem.symmetric ? 2 : 1);
  const int64_t threads = products < kSerialProducts ? 1 : at::get_num_threads();
  int64_t block = std::clamp<int64_t>(kBlockBytes / (P * (a.depth + 1) * int64_t(sizeof(T))), 1, 16);
  const auto blocks = [&](const Side<T>& side) { return (side.panels + block - 1) / block; };
  while (block > 1 && threads > 1 && blocks(a) * blocks(r) < 16 * threads) block /= 2;

  std::vector<Scan<T>> found(threads);
  std::atomic<int64_t> ticket{0};
  const int64_t columns = blocks(r), tasks = blocks(a) * columns;
  const Panels<T> pa = a.view(), pr = r.view();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Scan<T>& mine = found[thread] = {Best<T>(a.panels * P), Best<T>(a.panels * P)};
      for (int64_t task; (task = ticket++) < tasks;) {
        const int64_t i = task / columns, j = task % columns;
        if (problem.symmetric && j < i) continue;
        const Block here{i * block, std::min(a.panels, (i + 1) * block), j * block,
                         std::min(r.panels, (j + 1) * block)};
        kernels<T>().hardest(pa, pr, problem.packed_self.data(), problem.symmetric, here, mine.nearest.view(),
                             mine.farthest.view());
      }
    }
  });
  for (int64_t thread = 1; thread < threads; ++thread) {
    found[0].nearest.merge(found[thread].nearest);
    found[0].farthest.merge(found[thread].farthest);
  }
  return std::move(found[0]);
}

// Writes the winners; returns the anchors, packed and in full, for which rounding may have chosen them.
template <typename T>
std::pair<std::vector<int64_t>, std::vector<Doubtful<T>>> certify(const Problem<T>& problem, const Scan<T>& found,
                                                                  int64_t* positive, int64_t* negative) {
  const Side<T>&a = problem.a, &r = problem.r;
  bool hopeless = false;  // a scale that is subnormal in T: nothing is known about the packed row
  for (const Side<T>* side : {&a, &r})
    for (double s : side->scale) hopeless |= s < std::numeric_limits<T>::min();
  const RoundingBound bound = rounding_bound<T>(a.depth, problem.cosine, hopeless);
  constexpr T kNever = std::numeric_limits<T>::infinity();
  std::pair<std::vector<int64_t>, std::vector<Doubtful<T>>> doubts;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t o = a.order[i];
    if (!a.finite[o]) continue;
    Doubtful<T> row{o, a.klass[i], problem.packed_self[i], kNever, kNever, 0, 0, -1, -1};
    // The winner; and, where another may be as good, the value from which on a row may be.
    const auto winner = [&](const Top2<T>& top, T& threshold) -> int64_t {
      const double best = top.best[i], second = top.second[i];
      if (best < -kHidden / 2) return -1;
      const double error = bound(a.norm[i], 2 * std::max(std::fabs(best), std::fabs(second)));
      if (second > -kHidden / 2 && !(best - second > error)) threshold = T(best - error);
      return r.order[top.index[i]];
    };
    negative[o] = winner(found.nearest.view(), row.nearest);
    positive[o] = winner(found.farthest.view(), row.farthest);
    if (row.nearest == kNever && row.farthest == kNever) continue;
    doubts.first.push_back(i);
    doubts.second.push_back(row);
  }
  return doubts;
}

// Measures the candidates of the rows in doubt exactly, a panel of rows at a time.
template <typename T>
void settle(const Problem<T>& problem, const std::vector<int64_t>& packed, std::vector<Doubtful<T>>& doubtful,
            int64_t* positive, int64_t* negative) {
  const Side<T>&a = problem.a, &r = problem.r;
  const bool cosine = problem.cosine;
  const Exact<T> exact{a.rows,
                       r.rows,
                       a.depth,
                       cosine ? a.scale.data() : nullptr,
                       cosine ? r.scale.data() : nullptr,
                       cosine ? a.lack.data() : nullptr,
                       cosine ? r.lack.data() : nullptr,
                       r.order.data()};
  const int64_t P = kernels<T>().panel, count = int64_t(doubtful.size());
  const Panels<T> panels = r.view();
  at::parallel_for(0, (count + P - 1) / P, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> rows(P * a.depth), bias(P);
    std::vector<double> squares(P);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t n = std::min(P, count - g * P);
      a.pack_panel(&packed[g * P], n, problem.scale, problem.centre, rows.get(), bias.get(), squares.data());
      kernels<T>().settle(rows.get(), bias.get(), panels, r.panels, exact, &doubtful[g * P], int(n));
    }
  });
  for (const Doubtful<T>& row : doubtful) {
    if (row.negative >= 0) negative[row.anchor] = row.negative;
    if (row.positive >= 0) positive[row.anchor] = row.positive;
  }
}

template <typename T>
void select(Side<T>& a, Side<T>* references, std::optional<int64_t> offset, bool cosine, int64_t* positive,
            int64_t* negative) {
  Side<T>& r = references ? *references : a;
  classify(a, references);
  T largest = a.inspect(cosine);
  if (references) largest = std::max(largest, r.inspect(cosine));
  // Powers of two are exact, and keep squares far from the ends of the range.
  constexpr int kExponents = std::numeric_limits<T>::max_exponent - 2;
  const double scale = largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -kExponents, kExponents)) : 1;
  Problem<T> problem{a, r, !references, cosine, scale, r.centre(scale), {}, {}};
  a.pack(scale, problem.centre);
  if (references) r.pack(scale, problem.centre);
  problem.self.assign(a.count, -1);
  problem.packed_self.assign(a.panels * kernels<T>().panel, -1);
  for (int64_t i = 0; offset && i < a.count; ++i) {
    problem.self[i] = i + *offset;
    problem.packed_self[a.place[i]] = Lane<T>(r.place[i + *offset]);
  }

  const Scan<T> found = scan(problem);
  auto [packed, doubtful] = certify(problem, found, positive, negative);
  settle(problem, packed, doubtful, positive, negative);
  select_not_finite(a, r, problem.self, positive, negative);
}

template <typename T>
Side<T> side_of(const at::Tensor& x, const at::Tensor& y) {
  return {rows_of<T>(x), y.const_data_ptr<int64_t>(), x.size(0), x.size(1)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> select_hardest_cpu(const at::Tensor& embeddings, const at::Tensor& labels,
                                                      const OptionalTensor& references,
                                                      const OptionalTensor& reference_labels,
                                                      std::optional<int64_t> reference_offset,
                                                      std::string_view distance) {
  const int64_t count = embeddings.size(0), total = references ? references->size(0) : count;
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - 64;  // packed row numbers have 32 bits
  TORCH_CHECK_VALUE(std::max(count, total) <= kMostRows, "embeddings and ref_embeddings must have at most ", kMostRows,
                    " rows, got ", count, " and ", total);
  const auto options = at::TensorOptions(at::kLong);
  at::Tensor positive = at::full({count}, -1, options), negative = at::full({count}, -1, options);
  if (count == 0 || total == 0) return {positive, negative};
  const at::Tensor x = as_rows(embeddings), y = labels.contiguous();
  const at::Tensor r = references ? as_rows(*references) : x, z = references ? reference_labels->contiguous() : y;
  const bool cosine = parse_distance(distance) == Distance::Cosine;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Side<T> anchors = side_of<T>(x, y);
    std::optional<Side<T>> others;
    if (references) others = side_of<T>(r, z);
    select<T>(anchors, others ? &*others : nullptr, references ? reference_offset : 0, cosine,
              positive.mutable_data_ptr<int64_t>(), negative.mutable_data_ptr<int64_t>());
  });
  return {positive, negative};
}

}  // namespace triplet_ext
