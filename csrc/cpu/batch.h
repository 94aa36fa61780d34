// A batch made ready for the tile engine: both sides sorted by class, centred, packed.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "convert.h"

namespace triplet_ext {

constexpr int64_t kCentreRows = 64;          // a sample is enough: a centre need not be the mean
constexpr int64_t kBlockBytes = 192 << 10;   // of packed columns, to stay in the second-level cache
constexpr int64_t kManyDoubts = 4;           // anchors in doubt: as many as one in so many
constexpr double kSerialProducts = 4 << 20;  // below this, starting threads costs more than it saves

// Row numbers by label, stable. Radix sort on the bytes in which the labels differ at all.
inline std::vector<int64_t> sorted_by(const int64_t* labels, int64_t count, uint64_t differing) {
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

inline uint64_t differing_bits(const int64_t* labels, int64_t count, int64_t like) {
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

// What makes a row one of length 1, for the cosine distance, and what its square then lacks to one.
struct UnitRow {
  double scale, lack;
  bool finite;

  template <typename T>
  UnitRow(const T* row, int64_t depth) {
    const double s = kernels<T>().square(row, depth), floor = kCosineFloor * kCosineFloor;
    finite = std::isfinite(s);
    scale = 1 / std::sqrt(std::max(s, floor));
    lack = std::max(0.0, 1 - s / floor);
  }
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
  Buffer<T> half_lack;
  std::vector<Lane<T>> first, last;
  std::vector<uint8_t> gaps;

  Side(Rows<T> rows, const int64_t* labels, int64_t count, int64_t depth)
      : rows(rows), labels(labels), count(count), depth(depth), finite(count) {
    panels = (count + kernels<T>().panel - 1) / kernels<T>().panel;
  }

  // Some of the rows, by packed row numbers, ascending, packed as all are.
  Side subset(const std::vector<int64_t>& packed, double common, const std::vector<T>& centre) const {
    Side some(rows, labels, int64_t(packed.size()), depth);
    some.finite = finite;
    some.scale = scale;
    some.lack = lack;
    some.order.resize(some.count);
    some.klass.resize(some.count);
    for (int64_t i = 0; i < some.count; ++i) {
      some.order[i] = order[packed[i]];
      some.klass[i] = klass[packed[i]];
    }
    some.pack(common, centre);
    return some;
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
          const UnitRow unit(rows.row(i), depth);
          finite[i] = finite[i] && unit.finite;
          scale[i] = unit.scale;
          lack[i] = unit.lack;
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
    // Rounded to a quarter to a half of a feature's spread, so that small whole numbers stay such, and their
    // distances exact.
    std::vector<double> spread(depth);
    for (int64_t i = 0; i < count; i += std::max<int64_t>(1, step)) {
      if (!finite[i]) continue;
      const double factor = scale_of(i, common);
      for (int64_t k = 0; k < depth; ++k)
        spread[k] = std::max(spread[k], std::fabs(rows.row(i)[k] * factor - total[k] / double(taken)));
    }
    std::vector<T> mean(depth);
    for (int64_t k = 0; k < depth && taken; ++k) {
      const double value = total[k] / double(taken);
      const double grain = spread[k] > 0 ? std::ldexp(1.0, std::max(std::ilogb(spread[k]) - 1, -1000)) : 0;
      mean[k] = T(grain > 0 ? std::nearbyint(value / grain) * grain : value);
    }
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

  // The packed rows side by side, `width` elements each; where there is none, or it isn't finite, zeros.
  Buffer<T> packed_rows(double common, const std::vector<T>& centre, int64_t width) const {
    const int64_t P = kernels<T>().panel;
    Buffer<T> out(panels * P * width);
    at::parallel_for(0, panels * P, std::max<int64_t>(1, (1 << 15) / (width + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = out.get() + i * width;
        std::fill_n(row, width, T(0));
        if (i >= count || !finite[order[i]]) continue;
        const T* from = rows.row(order[i]);
        const T factor = T(scale_of(order[i], common));
        for (int64_t k = 0; k < depth; ++k) row[k] = from[k] * factor - centre[k];
      }
    });
    return out;
  }

  void pack(double common, const std::vector<T>& centre) {
    const int64_t P = kernels<T>().panel;
    data = Buffer<T>(panels * P * depth);
    bias = Buffer<T>(panels * P);
    group = Buffer<Lane<T>>(panels * P);
    norm.resize(panels * P);
    first.assign(panels, std::numeric_limits<Lane<T>>::max());
    last.assign(panels, Lane<T>(kNoGroup));
    gaps.assign(panels, 0);
    if (!lack.empty()) half_lack = Buffer<T>(panels * P);
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
          gaps[panel] |= !real;
          if (!lack.empty()) half_lack.get()[from + r] = real ? T(lack[order[from + r]] / 2) : T(0);
          if (real) {
            first[panel] = std::min(first[panel], g);
            last[panel] = std::max(last[panel], g);
          }
          squares[r] = std::sqrt(squares[r]);
        }
      }
    });
  }

  Panels<T> view() const {
    return {data.get(),  bias.get(), lack.empty() ? nullptr : half_lack.get(), group.get(), first.data(), last.data(),
            gaps.data(), depth};
  }

  bool all_finite() const { return std::find(finite.begin(), finite.end(), uint8_t(0)) == finite.end(); }
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

// Both sides, packed alike.
template <typename T>
struct Problem {
  Side<T>& a;  // anchors
  Side<T>& r;  // references; the anchors themselves if symmetric
  bool symmetric, cosine;
  double largest;  // |x| of the rows that are finite
  double scale;    // common to all rows, unless the distance is the cosine
  std::vector<T> centre;
  std::vector<int64_t> self;         // of an anchor among the references, or -1: original -> original
  std::vector<Lane<T>> packed_self;  // packed -> packed

  // `most`: the exponent of the largest scale. `headroom`: that up to which packed rows may grow, rather than small
  // distances be lost beside large rows.
  Problem(Side<T>& a, Side<T>* references, std::optional<int64_t> offset, bool cosine, int most, int headroom = 0)
      : a(a), r(references ? *references : a), symmetric(!references), cosine(cosine) {
    classify(a, references);
    largest = a.inspect(cosine);
    if (references) largest = std::max(largest, double(r.inspect(cosine)));
    // Powers of two are exact, and keep squares far from the ends of the range.
    constexpr int kLeast = 2 - std::numeric_limits<T>::max_exponent;
    const int exponent = largest > 0 ? std::ilogb(largest) : 0;
    const int down = std::max(std::min(exponent, headroom), exponent - headroom);
    scale = std::ldexp(1.0, std::clamp(-down, kLeast, most));
    centre = r.centre(scale);
    a.pack(scale, centre);
    if (references) r.pack(scale, centre);
    self.assign(a.count, -1);
    packed_self.assign(a.panels * kernels<T>().panel, -1);
    for (int64_t i = 0; offset && i < a.count; ++i) {
      self[i] = i + *offset;
      packed_self[a.place[i]] = Lane<T>(r.place[i + *offset]);
    }
  }
};

// How far two sums of exact_square() may be from the true ones, halved as the values v are, in float64's unit times the
// larger: three roundings of each term, and up to 35 additions on its way. Those of narrower rows are exact beside v.
constexpr int kExactUnits = 40;

template <typename T>
RoundingBound rounding_bound(const Problem<T>& problem, int64_t most = kChain) {
  const Side<T>&a = problem.a, &r = problem.r;
  const int64_t depth = a.depth, chain = std::min(depth, most) + (depth + most - 1) / most;
  RoundingBound bound;
  bound.unit = std::numeric_limits<T>::epsilon() / 2;
  bound.product = 2 * double(chain + 1) * bound.unit;
  bound.rest = (std::is_same_v<T, double> ? 16 + kExactUnits : 16) * bound.unit;
  bound.absolute = 4 * double(depth + 1) * std::numeric_limits<T>::min();
  for (double norm : r.norm) bound.longest = std::max(bound.longest, norm);
  bound.cosine = problem.cosine;
  for (const Side<T>* side : {&a, &r})  // a scale that is subnormal in T: nothing is known about the packed row
    for (double s : side->scale) bound.hopeless |= s < std::numeric_limits<T>::min();
  return bound;
}

// Of a row by its original number; equal rows have equal ones.
template <typename T>
uint64_t row_hash(const Side<T>& side, int64_t i) {
  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> bits = 0;
  uint64_t hash = 0;
  for (int64_t k = 0; k < side.depth; ++k) {
    const T value = side.rows.row(i)[k] + T(0);  // -0 is 0
    std::memcpy(&bits, &value, sizeof(value));
    hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

// For each row the first that equals it feature by feature, by original row numbers; itself where it isn't finite.
template <typename T>
std::vector<int64_t> first_equal_rows(const Side<T>& side) {
  std::vector<uint64_t> hash(side.count);
  at::parallel_for(0, side.count, std::max<int64_t>(1, (1 << 14) / (side.depth + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) hash[i] = row_hash(side, i);
  });
  std::vector<int64_t> order(side.count), first(side.count);
  for (int64_t i = 0; i < side.count; ++i) order[i] = first[i] = i;
  std::sort(order.begin(), order.end(),
            [&](int64_t i, int64_t j) { return hash[i] != hash[j] ? hash[i] < hash[j] : i < j; });
  for (int64_t from = 0, to; from < side.count; from = to) {
    for (to = from + 1; to < side.count && hash[order[to]] == hash[order[from]];) ++to;
    for (int64_t i = from + 1; i < to; ++i) {
      const T* row = side.rows.row(order[i]);
      for (int64_t j = from; j < i && side.finite[order[i]]; ++j) {
        if (first[order[j]] != order[j] || !std::equal(row, row + side.depth, side.rows.row(order[j]))) continue;
        first[order[i]] = order[j];
        break;
      }
    }
  }
  return first;
}

// Of rows that are equal feature by feature, those that decide which one is an anchor's nearest negative: the first in
// the caller's order, or else the first of another class. Packed, ascending.
template <typename T>
std::vector<int64_t> first_negatives(const Side<T>& r, const std::vector<int64_t>& first_equal) {
  std::vector<int64_t> other(r.count, -1), packed;
  for (int64_t o = 0; o < r.count; ++o) {
    const int64_t first = first_equal[o];
    const bool second = other[first] < 0 && r.labels[o] != r.labels[first];
    if (first == o || second) packed.push_back(r.place[o]);
    if (second) other[first] = o;
  }
  std::sort(packed.begin(), packed.end());
  return packed;
}

// Which rows, of both sides, are equal feature by feature: those of equal numbers, packed. Rows that are not finite
// equal none. Few rows have equal norms that are not equal themselves; the features of others are not looked at.
template <typename T>
class EqualRows {
 public:
  explicit EqualRows(const Problem<T>& problem) : x_(problem.a), a_(problem.a.panels * kernels<T>().panel, -1) {
    while (int64_t(1) << bits_ < 2 * x_.count) ++bits_;
    table_.assign(size_t(1) << bits_, -1);
    hash_.resize(x_.count);
    for (int64_t i = 0; i < x_.count; ++i) {
      if (!x_.finite[x_.order[i]]) continue;
      Lane<T>& first = find(x_, i);
      if (first < 0) first = Lane<T>(i);
      a_[i] = first;
    }
    if (problem.symmetric) return;
    r_.assign(problem.r.panels * kernels<T>().panel, -2);
    for (int64_t j = 0; j < problem.r.count; ++j) {
      if (!problem.r.finite[problem.r.order[j]]) continue;
      const Lane<T> first = find(problem.r, j);
      if (first >= 0) r_[j] = first;
    }
  }
  const Lane<T>* anchors() const { return a_.data(); }
  const Lane<T>* references() const { return r_.empty() ? a_.data() : r_.data(); }

 private:
  // Where the first anchor that equals a row is in the table, or is to be entered.
  Lane<T>& find(const Side<T>& side, int64_t i) {
    uint64_t place;
    std::memcpy(&place, &side.norm[i], sizeof(place));
    place = (place * 0x9e3779b97f4a7c15u) >> (64 - bits_);
    std::optional<uint64_t> hash;
    const T* row = side.rows.row(side.order[i]);
    for (;; place = (place + 1) & (table_.size() - 1)) {
      const Lane<T> other = table_[place];
      if (other < 0) return table_[place];
      if (x_.norm[other] != side.norm[i]) continue;
      if (!hash) hash = row_hash(side, side.order[i]);
      if (!hash_[other]) hash_[other] = row_hash(x_, x_.order[other]);
      const T* like = x_.rows.row(x_.order[other]);
      if (*hash_[other] == *hash && std::equal(row, row + side.depth, like)) return table_[place];
    }
  }

  const Side<T>& x_;
  std::vector<Lane<T>> a_, r_;
  int bits_ = 1;
  std::vector<Lane<T>> table_;                 // anchors, packed, by their norms; -1: nothing
  std::vector<std::optional<uint64_t>> hash_;  // of anchors, where one was needed
};

// What measures pairs exactly: from the given rows, by original row numbers.
template <typename T>
Exact<T> exact_of(const Problem<T>& problem, const int64_t* order_r) {
  const Side<T>&a = problem.a, &r = problem.r;
  const bool cosine = problem.cosine;
  return {a.rows,
          r.rows,
          a.depth,
          cosine ? a.scale.data() : nullptr,
          cosine ? r.scale.data() : nullptr,
          cosine ? a.lack.data() : nullptr,
          cosine ? r.lack.data() : nullptr,
          order_r};
}

// The distance without a root that selections compare, in float64: of an anchor and a reference.
template <typename T>
double exact_distance(const Exact<T>& exact, int64_t anchor, int64_t reference) {
  const T *x = exact.x.row(anchor), *y = exact.r.row(reference);
  if (!exact.scale_x) return kernels<T>().exact_square(x, y, exact.depth, 1, 1);
  const double square = kernels<T>().exact_square(x, y, exact.depth, exact.scale_x[anchor], exact.scale_r[reference]);
  return (square + exact.lack_x[anchor] + exact.lack_r[reference]) / 2;
}

inline void check_rows(int64_t count, int64_t total) {
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - 64;  // packed row numbers have 32 bits
  TORCH_CHECK_VALUE(std::max(count, total) <= kMostRows, "embeddings and ref_embeddings must have at most ", kMostRows,
                    " rows, got ", count, " and ", total);
}

template <typename T>
Side<T> side_of(const at::Tensor& x, const at::Tensor& y) {
  return {rows_of<T>(x), y.const_data_ptr<int64_t>(), x.size(0), x.size(1)};
}

// Rows that are not finite come before all others: an anchor takes the first of them that is its positive or
// its negative; an anchor that is such a row itself takes its first positive and its first negative. allows(anchor,
// reference) says whether a reference of the anchor's class may be its positive.
template <typename T, typename Allows>
void select_not_finite(const Side<T>& a, const Side<T>& r, Allows allows, int64_t* positive, int64_t* negative) {
  if (a.all_finite() && r.all_finite()) return;
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
    std::vector<int64_t> bad_members;
    for (; end < r.count && r.klass[end] == a.klass[i]; ++end)
      if (!r.finite[r.order[end]]) bad_members.push_back(r.order[end]);
    for (; i < i_end; ++i) {
      const int64_t o = a.order[i];
      const auto first_of = [&](auto from, auto to) {
        const auto found = std::find_if(from, to, [&](int64_t j) { return allows(o, j); });
        return found == to ? int64_t(-1) : int64_t(*found);
      };
      int64_t p = first_of(bad_members.begin(), bad_members.end()), n = bad.outside(r, a.labels[o]);
      const int64_t first = first_of(r.order.begin() + begin, r.order.begin() + end);
      // Beside one that isn't finite, any will do where none was chosen.
      if (!a.finite[o] || (p < 0 && positive[o] < 0)) p = first;
      if (!a.finite[o] || (n < 0 && negative[o] < 0)) n = any.outside(r, a.labels[o]);
      if (p >= 0) positive[o] = p;
      if (n >= 0) negative[o] = n;
    }
    begin = end;
  }
}

}  // namespace triplet_ext
