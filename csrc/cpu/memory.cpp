// Mining from a memory, too: references without a gradient, of which there may be a million.
//
// One positive and one negative of each anchor are chosen from a piece of the memory at a time, where the rows lie, and
// the pieces' winners are compared exactly. First the positives: the rows of the batch's labels are few. Then, where
// the negative depends on the positive, each piece is searched together with the positives that were chosen.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_set>
#include <vector>

#include "../ops.h"
#include "batch.h"
#include "interrupt.h"
#include "restriction.h"

namespace triplet_ext {
namespace {

constexpr int64_t kPieceBytes = 2 << 20;  // of rows: its packed copy stays in the caches

int64_t piece_rows(int64_t width, int64_t element) {
  return std::clamp<int64_t>(kPieceBytes / std::max<int64_t>(1, width * element), 1024, 1 << 15);
}

// One choice of an anchor: a reference, its exact distance, and whether both are finite.
struct Choice {
  int64_t index = -1;
  double distance = 0;
  bool finite = true;

  // Rows that are not finite come before all others, the lowest index first.
  bool decided_by_rows(const Choice& other, bool& takes) const {
    if (index >= 0 && finite && other.finite) return false;
    takes = index < 0 || (finite && !other.finite) || (finite == other.finite && other.index < index);
    return true;
  }
  // Takes the nearer of both (the farther, if sign is -1); of equal ones the lowest index.
  void merge(const Choice& other, double sign, double tie) {
    if (other.index < 0) return;
    bool takes;
    if (!decided_by_rows(other, takes)) {
      const double gap = sign * (other.distance - distance);
      takes = gap < -tie || (gap <= tie && other.index < index);
    }
    if (takes) *this = other;
  }
};

// Measures pairs as every selection does.
template <typename T>
class Measuring {
 public:
  Measuring(const at::Tensor& x, bool cosine) : x_(x), cosine_(cosine), sides_(x.size(0)) {
    const Rows<T> rows = rows_of<T>(x_);
    for (int64_t i = 0; i < x_.size(0); ++i) sides_[i] = side(rows.row(i));
  }

  Choice measured(int64_t anchor, const T* row, int64_t index) const {
    const OneRow r = side(row);
    const OneRow& a = sides_[anchor];
    const int64_t depth = x_.size(1);
    const double square = kernels<T>().exact_square(rows_of<T>(x_).row(anchor), row, depth, a.scale, r.scale);
    return {index, cosine_ ? (square + a.lack + r.lack) / 2 : square, a.finite && r.finite};
  }

 private:
  struct OneRow {
    double scale = 1, lack = 0;
    bool finite = true;
  };
  OneRow side(const T* row) const {
    OneRow found;
    const int64_t depth = x_.size(1);
    if (cosine_) {
      const UnitRow unit(row, depth);
      found = {unit.scale, unit.lack, unit.finite};
    }
    for (int64_t k = 0; k < depth; ++k) found.finite = found.finite && std::isfinite(row[k]);
    return found;
  }

  at::Tensor x_;
  bool cosine_;
  std::vector<OneRow> sides_;
};

// The arguments of a call.
struct Call {
  at::Tensor x, y;  // anchors
  at::Tensor r, z;  // references, the anchors if there are no others
  std::optional<int64_t> offset;
  at::Tensor memory, memory_labels;  // the valid rows
  OptionalTensor ids, memory_ids;
  std::string_view distance;

  Call(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
       const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
       const at::Tensor& memory_count, const OptionalTensor& ids, const OptionalTensor& memory_ids,
       std::optional<int64_t> reference_offset, std::string_view distance)
      : x(embeddings.detach()),  // threads of a parallel loop know nothing of autograd's state
        y(labels.contiguous()),
        r(references ? references->detach() : x),
        z(references ? reference_labels->contiguous() : y),
        offset(references ? reference_offset : 0),
        distance(distance) {
    const int64_t count = std::clamp<int64_t>(memory_count.item<int64_t>(), 0, memory.size(0));
    this->memory = memory.detach().narrow(0, 0, count);
    this->memory_labels = memory_labels.contiguous().narrow(0, 0, count);
    if (ids && memory_ids) {
      this->ids = ids->contiguous();
      this->memory_ids = memory_ids->contiguous().narrow(0, 0, count);
    }
  }

  at::Tensor ids_behind_references(const at::Tensor& of) const {
    return at::cat({at::full({r.size(0)}, kNoId, of.options()), of});
  }
};

// All references in one tensor, those of the memory last.
struct Joined {
  at::Tensor r, z, other_ids;
  Restriction restriction;

  explicit Joined(const Call& call) : r(at::cat({call.r, call.memory})), z(at::cat({call.z, call.memory_labels})) {
    if (!call.ids) return;
    other_ids = call.ids_behind_references(*call.memory_ids);
    restriction.ids = index_of(*call.ids);
    restriction.other_ids = index_of(other_ids);
  }
};

template <typename T>
class Search {
 public:
  Search(const Call& call, std::string_view positive, std::string_view negative)
      : call_(call),
        positive_(positive),
        negative_(negative),
        first_(call.r.size(0)),
        count_(call.x.size(0)),
        measuring_(as_rows(call.x), parse_distance(call.distance) == Distance::Cosine),
        tie_(parse_distance(call.distance) == Distance::Cosine ? kCosineTie : 0),
        positives_(count_),
        negatives_(count_) {}

  std::tuple<at::Tensor, at::Tensor> run() {
    const bool at_once = positive_ == "hard" && negative_ == "hard" && !call_.ids;
    if (!at_once) choose_positives();
    if (negative_ == "hard") hardest(at_once);
    else choose_semi_hard();
    const at::Tensor p = at::full({count_}, -1, at::kLong), n = at::full({count_}, -1, at::kLong);
    for (int64_t i = 0; i < count_; ++i) {
      if (positives_[i].index < 0 || negatives_[i].index < 0) continue;
      p.mutable_data_ptr<int64_t>()[i] = positives_[i].index;
      n.mutable_data_ptr<int64_t>()[i] = negatives_[i].index;
    }
    return {p, n};
  }

 private:
  // The choices of a piece, of each anchor.
  struct Found {
    std::vector<Choice> positives, negatives;
  };

  // merge(search(first row, number of rows)) for each piece of so many rows: searched in parallel, merged in order.
  template <typename S, typename M>
  void each_piece(int64_t total, S search, M merge) const {
    const int64_t step = piece_rows(call_.x.size(1), call_.x.element_size()), pieces = (total + step - 1) / step;
    std::vector<Found> found(std::min<int64_t>(pieces, 4 * at::get_num_threads()));
    for (int64_t first = 0; first < pieces; first += int64_t(found.size())) {
      const int64_t some = std::min(int64_t(found.size()), pieces - first);
      Tasks tasks(some);
      at::parallel_for(0, std::min<int64_t>(some, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread)
          for (int64_t i; tasks.take(i);) {
            const int64_t from = (first + i) * step;
            found[i] = search(from, std::min(step, total - from));
          }
      });
      for (int64_t i = 0; i < some; ++i) merge(found[i]);
    }
  }

  // What was chosen among these references; number(index) says which each is of all.
  template <typename N>
  std::vector<Choice> measured(const at::Tensor& chosen, const at::Tensor& references, N number) const {
    const at::Tensor rows = as_rows(references);
    const Rows<T> row = rows_of<T>(rows);
    std::vector<Choice> choices(count_);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t j = index_of(chosen)[i];
      if (j >= 0) choices[i] = measuring_.measured(i, row.row(j), number(j));
    }
    return choices;
  }

  void merge(std::vector<Choice>& into, const std::vector<Choice>& choices, double sign) const {
    for (int64_t i = 0; i < int64_t(choices.size()); ++i) into[i].merge(choices[i], sign, tie_);
  }

  // The nearest negative, and the farthest positive where that is asked for.
  void hardest(bool positives) {
    const auto search = [&](const at::Tensor& r, const at::Tensor& z, std::optional<int64_t> offset, int64_t before) {
      const auto [p, n] = select_hardest_cpu(call_.x, call_.y, r, z, offset, call_.distance);
      const auto number = [&](int64_t j) { return before + j; };
      Found found{{}, measured(n, r, number)};
      if (positives) found.positives = measured(p, r, number);
      return found;
    };
    const auto take = [&](const Found& found) {
      merge(positives_, found.positives, -1);
      merge(negatives_, found.negatives, 1);
    };
    take(search(call_.r, call_.z, call_.offset, 0));
    each_piece(
        call_.memory.size(0),
        [&](int64_t from, int64_t rows) {
          return search(call_.memory.narrow(0, from, rows), call_.memory_labels.narrow(0, from, rows), std::nullopt,
                        first_ + from);
        },
        take);
  }

  // Among the references and those rows of the memory that have a label of the batch.
  void choose_positives() {
    const std::unordered_set<int64_t> labels(index_of(call_.y), index_of(call_.y) + count_);
    std::vector<int64_t> rows;
    for (int64_t j = 0; j < call_.memory.size(0); ++j)
      if (labels.count(index_of(call_.memory_labels)[j])) rows.push_back(j);
    // Where there is no negative there is no triplet: so there is one, a row of a label that no anchor has.
    const at::Tensor some_row = call_.x.narrow(0, 0, 1);
    int64_t other_label = 0;
    while (labels.count(other_label)) ++other_label;
    const at::Tensor some_label = at::full({1}, other_label, at::kLong);

    const at::Tensor all = at::from_blob(rows.data(), {int64_t(rows.size())}, at::kLong);
    const double sign = positive_ == "hard" ? -1 : 1;
    const auto choose = [&](int64_t from, int64_t some) {
      const at::Tensor taken = all.narrow(0, from, some);
      const at::Tensor r = at::cat({call_.r, call_.memory.index_select(0, taken), some_row});
      const at::Tensor z = at::cat({call_.z, call_.memory_labels.index_select(0, taken), some_label});
      at::Tensor other_ids;
      Restriction restriction;
      if (call_.ids) {
        const at::Tensor nobody = at::full({1}, kNoId, at::kLong);
        other_ids = at::cat({call_.ids_behind_references(call_.memory_ids->index_select(0, taken)), nobody});
        restriction.ids = index_of(*call_.ids);
        restriction.other_ids = index_of(other_ids);
      }
      const auto found =
          select_pair_restricted(call_.x, call_.y, r, z, call_.offset, restriction, call_.distance, positive_, "hard");
      const auto number = [&](int64_t j) { return j < first_ ? j : first_ + rows[from + j - first_]; };
      return Found{measured(std::get<0>(found), r, number), {}};
    };
    const auto take = [&](const Found& found) { merge(positives_, found.positives, sign); };
    if (rows.empty()) take(choose(0, 0));
    each_piece(int64_t(rows.size()), choose, take);
  }

  void choose_semi_hard() {
    // The chosen positives that lie in the memory, one row an anchor.
    std::vector<int64_t> place(count_), given(count_);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t j = positives_[i].index;
      place[i] = std::max<int64_t>(0, j - first_);
      given[i] = j < first_ ? j : first_ + i;
    }
    at::Tensor rows = call_.r.narrow(0, 0, 0), labels = call_.z.narrow(0, 0, 0);
    if (call_.memory.size(0) > 0) {
      const at::Tensor at = at::from_blob(place.data(), {count_}, at::kLong);
      rows = call_.memory.index_select(0, at);
      labels = call_.memory_labels.index_select(0, at);
    }
    Restriction restriction;
    restriction.given = given.data();
    std::vector<Choice> beyond(count_), farthest(count_);
    const auto choose = [&](int64_t from, int64_t some) {
      const at::Tensor r = at::cat({call_.r, rows, call_.memory.narrow(0, from, some)});
      const at::Tensor z = at::cat({call_.z, labels, call_.memory_labels.narrow(0, from, some)});
      const auto found = select_pair_restricted(call_.x, call_.y, r, z, call_.offset, restriction, call_.distance,
                                                positive_, negative_);
      const auto number = [&](int64_t j) {
        const int64_t behind = j - first_ - rows.size(0);
        return j < first_ ? j : behind < 0 ? first_ + place[j - first_] : first_ + from + behind;
      };
      return Found{{}, measured(std::get<1>(found), r, number)};
    };
    const auto take = [&](const Found& found) {
      for (int64_t i = 0; i < count_; ++i) {
        const Choice &p = positives_[i], &choice = found.negatives[i];
        if (p.finite && choice.finite && choice.distance > p.distance + tie_) beyond[i].merge(choice, 1, tie_);
        else farthest[i].merge(choice, -1, tie_);
      }
    };
    if (call_.memory.size(0) == 0) take(choose(0, 0));
    each_piece(call_.memory.size(0), choose, take);
    for (int64_t i = 0; i < count_; ++i) {
      const bool first_not_finite = farthest[i].index >= 0 && !farthest[i].finite;
      negatives_[i] = beyond[i].index >= 0 && !first_not_finite ? beyond[i] : farthest[i];
    }
  }

  const Call& call_;
  const std::string_view positive_, negative_;
  const int64_t first_, count_;  // the references before those of the memory; the anchors
  const Measuring<T> measuring_;
  const double tie_;
  std::vector<Choice> positives_, negatives_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> select_with_memory_cpu(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
    const at::Tensor& memory_count, const OptionalTensor& ids, const OptionalTensor& memory_ids,
    std::optional<int64_t> reference_offset, std::string_view distance, std::string_view positive,
    std::string_view negative) {
  const Call call(embeddings, labels, references, reference_labels, memory, memory_labels, memory_count, ids,
                  memory_ids, reference_offset, distance);
  check_rows(embeddings.size(0), call.r.size(0) + call.memory.size(0));
  if (embeddings.size(0) == 0) return {at::empty({0}, at::kLong), at::empty({0}, at::kLong)};
  return dispatch(embeddings, [&](auto zero) { return Search<decltype(zero)>(call, positive, negative).run(); });
}

Loss mined_triplet_loss_with_memory_cpu(const at::Tensor& embeddings, const at::Tensor& labels,
                                        const OptionalTensor& references, const OptionalTensor& reference_labels,
                                        const at::Tensor& memory, const at::Tensor& memory_labels,
                                        const at::Tensor& memory_count, const OptionalTensor& ids,
                                        const OptionalTensor& memory_ids, std::optional<int64_t> reference_offset,
                                        std::string_view positive, std::string_view negative, double margin,
                                        std::string_view distance, bool swap, bool soft_margin,
                                        std::string_view reduction) {
  const Call call(embeddings, labels, references, reference_labels, memory, memory_labels, memory_count, ids,
                  memory_ids, reference_offset, distance);
  const Joined joined(call);
  auto [loss, saved, stats] =
      mined_triplet_loss_restricted(embeddings, labels, joined.r, joined.z, call.offset, joined.restriction, positive,
                                    negative, margin, distance, swap, soft_margin, reduction);
  // Of a width that the shapes tell, not the number of rows that are there.
  const int64_t width = saved_width(embeddings, call.r.size(0) + memory.size(0));
  if (saved.size(1) < width) saved = at::cat({saved, saved.new_zeros({saved.size(0), width - saved.size(1)})}, 1);
  return Loss(loss, saved, stats);
}

std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_with_memory_backward_cpu(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
    const at::Tensor& memory_count, const OptionalTensor& ids, const OptionalTensor& memory_ids,
    std::optional<int64_t> reference_offset, const at::Tensor& saved, const at::Tensor& stats,
    std::string_view positive, std::string_view negative, double margin, std::string_view distance, bool swap,
    bool soft_margin, std::string_view reduction) {
  const Call call(embeddings, labels, references, reference_labels, memory, memory_labels, memory_count, ids,
                  memory_ids, reference_offset, distance);
  const Joined joined(call);
  const int64_t width = saved_width(embeddings, joined.r.size(0));
  auto [own, other] =
      mined_triplet_loss_backward_restricted(grad, embeddings, labels, joined.r, joined.z, call.offset,
                                             joined.restriction, saved.narrow(1, 0, width).contiguous(), stats,
                                             positive, negative, margin, distance, swap, soft_margin, reduction);
  other = other.narrow(0, 0, call.r.size(0));
  if (!references) return {own.add(other), at::empty({0}, embeddings.options())};
  return {own, other.clone()};
}

}  // namespace triplet_ext
