// From tensors to the kernels: the device, its current stream, workspace from torch's allocator, and which kernel.
// Nothing here waits for the device or allocates beside torch, so all of it can be captured in a CUDA graph.
#include <ATen/Context.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../ops.h"
#include "../options.h"
#include "params.h"

namespace triplet_ext {
namespace {

// Where the paths part. On the CPU a test sets them, to take each path at small sizes.
struct Thresholds {
  // Up to this much work, B R D, all pairs in one launch are faster than the tiles' preparation.
  int64_t most_pairs = int64_t(1) << 28;
  // Up to this many triplets each row looks through all of them for its own; beyond, an inverse index is sorted.
  int64_t most_scanned = 2048;
  int64_t most_slots = 128;      // positives an anchor in a round of a strategy's backward pass
  int64_t room_bytes = 4 << 20;  // what rounds may take in all, or
  int64_t room_bytes_each = 64;  // an anchor, if that is more
  int64_t chunk = kMostChunk;    // positives an anchor that a block holds at a time
};
#if defined(TRIPLET_SIMT)
Thresholds thresholds;
#else
constexpr Thresholds thresholds;
#endif

void check(int error, const char* kernel) {
  if (error == cudaSuccess) return;
  const auto code = cudaError_t(error);
  TORCH_CHECK(code != cudaErrorNoKernelImageForDevice && code != cudaErrorInvalidDeviceFunction,
              "triplet_ext was built for the CUDA architectures " TRIPLET_EXT_CUDA
              " and has no code for this GPU; build it with TORCH_CUDA_ARCH_LIST set to the GPU's");
  TORCH_CHECK(false, "triplet_ext's CUDA kernel ", kernel, " could not be launched: ", cudaGetErrorString(code));
}

Element element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Element::Float64;
    case at::kHalf:
      return Element::Float16;
    case at::kBFloat16:
      return Element::BFloat16;
    default:
      return Element::Float32;
  }
}

Matrix matrix_of(const at::Tensor& x) { return {x.const_data_ptr(), x.size(0), x.stride(0), x.stride(1)}; }

const int64_t* index_of(const at::Tensor& x) { return x.const_data_ptr<int64_t>(); }

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Blocks of the tiles' kernel that run at once: two a multiprocessor where their shared memory fits.
int resident_blocks() {
  int device = 0, count = 0, shared = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  constexpr int kEach = 72 << 10;
  return count * (shared >= 2 * kEach ? 2 : 1);
}

Loss forward(TripletForwardParams params, const at::Tensor& like, bool indexed) {
  const auto acc = like.options().dtype(accumulation_type(like));
  const bool none = params.reduction == Reduction::None;
  at::Tensor loss = none ? at::empty({params.count}, acc) : at::empty({}, acc);
  at::Tensor distances = at::empty({params.measure.swap ? 3 : 2, params.count}, acc);
  at::Tensor stats = at::empty({kStats}, like.options().dtype(at::kDouble));
  // The ticket lies behind the sums. A memset is no kernel: a launch less than at::zeros.
  const int64_t sums = triplet_blocks(params.count) * kStats;
  const at::Tensor partial = at::empty({sums + 1}, stats.options());
  params.partial = partial.mutable_data_ptr<double>();
  params.ticket = reinterpret_cast<unsigned*>(params.partial + sums);
  C10_CUDA_CHECK(cudaMemsetAsync(params.ticket, 0, sizeof(double), stream()));
  at::Tensor met;
  if (indexed && !params.mined) {
    met = at::zeros({(params.anchor.rows + 31) / 32 + 1}, like.options().dtype(at::kInt));
    params.met = reinterpret_cast<unsigned*>(met.mutable_data_ptr<int32_t>());
  }
  params.distances = distances.mutable_data_ptr();
  params.loss = loss.mutable_data_ptr();
  params.stats = stats.mutable_data_ptr<double>();
  check(launch_triplet_forward(params, element_of(like), stream()), "triplet_forward");
  return {loss, distances, stats};
}

// Keeps what the parameters point to.
struct Gradient {
  at::Tensor grad;

  Gradient(TripletBackwardParams& params, const at::Tensor& grad, const at::Tensor& distances, const at::Tensor& stats)
      : grad(grad.to(distances.scalar_type()).contiguous()) {
    params.grad = this->grad.const_data_ptr();
    params.grad_stride = params.reduction == Reduction::None ? 1 : 0;
    params.distances = const_cast<void*>(distances.const_data_ptr());
    params.stats = stats.const_data_ptr<double>();
  }
};

TripletParams explicit_params(const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative,
                              const Measure& measure, std::string_view reduction) {
  return {matrix_of(anchor),
          matrix_of(positive),
          matrix_of(negative),
          nullptr,
          nullptr,
          nullptr,
          false,
          anchor.size(0),
          anchor.size(1),
          measure,
          parse_reduction(reduction),
          nullptr};
}

// The parameters of indexed triplets, and the tensors they point to.
struct Indexed {
  at::Tensor anchor, positive, negative;
  TripletParams params;

  Indexed(const at::Tensor& embeddings, const OptionalTensor& references, const OptionalTensor& given,
          const at::Tensor& p, const at::Tensor& n, const Measure& measure, std::string_view reduction)
      : positive(p.contiguous()), negative(n.contiguous()) {
    if (given) anchor = given->contiguous();
    const Matrix others = matrix_of(references ? *references : embeddings);
    params = {matrix_of(embeddings),
              others,
              others,
              given ? index_of(anchor) : nullptr,
              index_of(positive),
              index_of(negative),
              !given,
              p.size(0),
              embeddings.size(1),
              measure,
              parse_reduction(reduction),
              nullptr};
  }
};

// 1 / max(norm, floor) of each row, and what the scaled row's squared norm lacks to 1, for the cosine distance.
void norms(const at::Tensor& x, void* inverse, void* lack) {
  check(launch_norms({matrix_of(x), x.size(1), inverse, lack}, element_of(x), stream()), "row_norms");
}

void check_rows(int64_t count, int64_t total) {
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - 2 * kTileRows;  // row numbers have 32 bits
  TORCH_CHECK_VALUE(std::max(count, total) <= kMostRows, "embeddings and ref_embeddings must have at most ", kMostRows,
                    " rows, got ", count, " and ", total);
}

// What an operator that mines is given.
struct Batch {
  at::Tensor x, y;            // anchors
  OptionalTensor r, z;        // references; absent: the anchors
  at::Tensor keys;            // z, and where no row is there a number above every label
  at::Tensor there;           // how many references are there; undefined: all
  at::Tensor ids, other_ids;  // undefined: none
  std::optional<int64_t> offset;

  Batch(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
        const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset)
      : x(embeddings), y(labels.contiguous()), r(references), keys(y), offset(references ? reference_offset : 0) {
    if (references) keys = *(z = reference_labels->contiguous());
  }

  // With the first rows of a memory behind the references.
  Batch(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
        const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
        const at::Tensor& memory_count, const OptionalTensor& given_ids, const OptionalTensor& memory_ids,
        std::optional<int64_t> reference_offset)
      : Batch(embeddings, labels, references, reference_labels, reference_offset) {
    const at::Tensor before = references ? *references : embeddings, before_labels = keys;
    const int64_t first = before.size(0), more = memory.size(0);
    r = at::cat({before, memory});
    z = at::cat({before_labels, memory_labels});
    const at::Tensor none = at::full({}, std::numeric_limits<int64_t>::max(), y.options());
    const at::Tensor is_there = at::arange(more, y.options()).lt(memory_count);
    keys = at::cat({before_labels, at::where(is_there, memory_labels, none)});
    there = memory_count.clamp(0, more).add(first);
    if (!given_ids || !memory_ids) return;
    ids = given_ids->contiguous();
    other_ids = at::cat({at::full({first}, kNoId, y.options()), *memory_ids});
  }

  const at::Tensor& references() const { return r ? *r : x; }
  const at::Tensor& reference_labels() const { return z ? *z : y; }
  const int64_t* there_or_null() const { return there.defined() ? index_of(there) : nullptr; }
  Own own() const {
    return {offset.value_or(kNobody), ids.defined() ? index_of(ids) : nullptr,
            ids.defined() ? index_of(other_ids) : nullptr};
  }
};

// --- the selection from tiles -----------------------------------------------------------------------------------

// A side's labels in ascending order, and room for its rows.
struct Side {
  at::Tensor labels, order, packed, bias, finite, range;
  TileSide params;

  Side(const at::Tensor& x, const at::Tensor& keys, const int64_t* there, int64_t packed_bytes,
       const at::Tensor& inverse) {
    const int64_t count = x.size(0), padded = (count + kTileRows - 1) / kTileRows * kTileRows;
    std::tie(labels, order) = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const auto bytes = x.options().dtype(at::kByte);
    packed = at::empty({padded * packed_bytes}, bytes);
    bias = at::empty({padded}, x.options().dtype(at::kFloat));
    finite = at::empty({count}, bytes);
    range = at::empty({2, padded}, x.options().dtype(at::kInt));
    int32_t* const low = range.mutable_data_ptr<int32_t>();
    const float* const scale = inverse.defined() ? inverse.const_data_ptr<float>() : nullptr;
    params = {matrix_of(x),
              index_of(labels),
              index_of(order),
              scale,
              scale ? scale + count : nullptr,
              count,
              padded,
              there,
              packed.mutable_data_ptr(),
              bias.mutable_data_ptr<float>(),
              finite.mutable_data_ptr<uint8_t>(),
              low,
              low + padded};
  }
};

// Of float32 rows, as torch multiplies them.
Products float32_products() {
  const auto& context = at::globalContext();
  try {
    switch (context.float32MatmulPrecision()) {
      case at::Float32MatmulPrecision::HIGHEST:
        return Products::Float32;
      case at::Float32MatmulPrecision::HIGH:
        return Products::TF32;
      default:
        return Products::BFloat16;
    }
  } catch (const c10::Error&) {  // refuses to say where torch.backends.*.fp32_precision was set
    const auto precision = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
    return precision == at::Float32Precision::TF32 ? Products::TF32 : Products::Float32;
  }
}

Products products_of(const at::Tensor& x, bool cosine) {
  if (x.scalar_type() == at::kFloat) return float32_products();
  if (cosine) return Products::TF32;  // unit rows have more bits than the type
  return x.scalar_type() == at::kHalf ? Products::Float16 : Products::BFloat16;
}

void select_tiles(const Batch& batch, const at::Tensor& unit_x, const at::Tensor& unit_r, int64_t* positive,
                  int64_t* negative) {
  const at::Tensor& x = batch.x;
  const Products products = products_of(x, unit_x.defined());
  const int64_t width = products == Products::Float32 || products == Products::TF32 ? 4 : 2;
  const int64_t packed_bytes = (x.size(1) * width + kTileChunk - 1) / kTileChunk * kTileChunk;
  const Side anchors(x, batch.y, nullptr, packed_bytes, unit_x);
  std::optional<Side> others;
  if (batch.r) others.emplace(*batch.r, batch.keys, batch.there_or_null(), packed_bytes, unit_r);
  const at::Tensor shift = at::empty({x.size(1) + 1}, x.options().dtype(at::kFloat));
  const at::Tensor zeros = at::zeros({2 * x.size(0) + 1}, x.options().dtype(at::kLong));
  auto* const keys = reinterpret_cast<unsigned long long*>(zeros.mutable_data_ptr<int64_t>());
  const TileParams params{anchors.params,
                          others ? others->params : anchors.params,
                          !batch.r,
                          products,
                          x.size(1),
                          packed_bytes,
                          batch.own(),
                          shift.mutable_data_ptr<float>(),
                          keys,
                          keys + x.size(0),
                          reinterpret_cast<unsigned*>(keys + 2 * x.size(0)),
                          positive,
                          negative,
                          resident_blocks()};
  check(launch_select_tiles(params, element_of(x), stream()), "select_tiles");
}

// --- every other strategy -----------------------------------------------------------------------------------------

// The rows of one side in the order of their labels.
struct OrderedSide {
  at::Tensor labels, order, finite, unit;
  MinedSide params;

  OrderedSide(const at::Tensor& x, const at::Tensor& given, const at::Tensor& keys, const int64_t* there, bool cosine) {
    const int64_t count = x.size(0);
    std::tie(labels, order) = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    finite = at::empty({count}, x.options().dtype(at::kByte));
    const char* inverse = nullptr;
    if (cosine) {
      unit = at::empty({2, count}, x.options().dtype(accumulation_type(x)));
      char* const at = static_cast<char*>(unit.mutable_data_ptr());
      norms(x, at, at + count * int64_t(unit.element_size()));
      inverse = at;
    }
    params = {matrix_of(x),
              index_of(labels),
              index_of(order),
              index_of(given),
              inverse,
              cosine ? inverse + count * int64_t(unit.element_size()) : nullptr,
              finite.mutable_data_ptr<uint8_t>(),
              there};
  }
};

// What the strategies' kernels share, and the tensors that it points to.
struct Mined {
  OrderedSide anchors;
  std::optional<OrderedSide> others;
  at::Tensor reach, itself, bad, most, counters;
  MinedParams params{};

  Mined(const Batch& batch, std::string_view positive, std::string_view negative, const Measure& measure,
        Reduction reduction)
      : anchors(batch.x, batch.y, batch.y, nullptr, measure.distance == Distance::Cosine) {
    const at::Tensor& x = batch.x;
    const int64_t count = x.size(0);
    check_rows(count, batch.references().size(0));
    if (batch.r)
      others.emplace(*batch.r, *batch.z, batch.keys, batch.there_or_null(), measure.distance == Distance::Cosine);
    const auto of = [&](at::ScalarType type) { return x.options().dtype(type); };
    reach = at::empty({count, int64_t(sizeof(Reach))}, of(at::kByte));
    itself = at::empty({count}, of(at::kInt));
    bad = at::empty({count}, of(at::kByte));
    most = at::empty({(count + kMinedRows - 1) / kMinedRows}, of(at::kInt));
    counters = at::empty({kMinedCounters}, of(at::kInt));
    params.x = anchors.params;
    params.r = others ? others->params : anchors.params;
    params.apart = batch.r.has_value();
    params.depth = x.size(1);
    params.own = batch.own();
    params.positive = parse_positive(positive);
    params.negative = parse_negative(negative);
    params.measure = measure;
    params.reduction = reduction;
    params.reach = static_cast<Reach*>(reach.mutable_data_ptr());
    params.itself = itself.mutable_data_ptr<int32_t>();
    params.bad = bad.mutable_data_ptr<uint8_t>();
    params.most = most.mutable_data_ptr<int32_t>();
    params.counters = reinterpret_cast<unsigned*>(counters.mutable_data_ptr<int32_t>());
    params.chunk = thresholds.chunk;
    C10_CUDA_CHECK(cudaMemsetAsync(params.counters, 0, kMinedCounters * sizeof(unsigned), stream()));
  }

  bool single() const { return params.positive != PositiveRule::All; }
  bool one_negative() const { return params.negative != NegativeRule::All; }
  // Of an entry, and of an anchor beside those.
  int64_t entry_bytes(int64_t acc) const { return 2 * acc + (one_negative() ? 4 : 0); }
  int64_t anchor_bytes() const { return single() ? 4 : 0; }
  // The most entries that an anchor can have.
  int64_t useful() const { return single() ? 1 : params.r.rows.rows; }

  // As many entries as there are bytes for: the numbers in front, so that they are aligned.
  Entries entries(const at::Tensor& memory, int64_t acc, int64_t first, int64_t most_slots) const {
    const int64_t count = params.x.rows.rows, each = count ? int64_t(memory.nbytes()) / count : 0;
    const int64_t slots =
        std::max<int64_t>(0, std::min({(each - anchor_bytes()) / entry_bytes(acc), useful(), most_slots}));
    char* const a = static_cast<char*>(const_cast<void*>(memory.const_data_ptr()));
    char* const b = a + slots * count * acc;
    auto* const n = reinterpret_cast<int32_t*>(b + slots * count * acc);
    return {a,     b,    one_negative() ? n : nullptr, single() ? n + (one_negative() ? slots * count : 0) : nullptr,
            first, slots};
  }
};

std::tuple<at::Tensor, at::Tensor> select_hardest(const Batch& batch, std::string_view distance) {
  const at::Tensor &x = batch.x, &others = batch.references();
  const int64_t count = x.size(0), total = others.size(0), depth = x.size(1);
  check_rows(count, total);
  at::Tensor positive = at::empty({count}, batch.y.options()), negative = at::empty({count}, batch.y.options());
  if (count == 0) return {positive, negative};
  at::Tensor unit_x, unit_r;
  if (parse_distance(distance) == Distance::Cosine) {
    const auto units = [](const at::Tensor& rows) {
      at::Tensor unit = at::empty({2, rows.size(0)}, rows.options().dtype(accumulation_type(rows)));
      char* const inverse = static_cast<char*>(unit.mutable_data_ptr());
      norms(rows, inverse, inverse + rows.size(0) * int64_t(unit.element_size()));
      return unit;
    };
    unit_x = units(x);
    unit_r = batch.r ? units(others) : unit_x;
  }
  int64_t* const p = positive.mutable_data_ptr<int64_t>();
  int64_t* const n = negative.mutable_data_ptr<int64_t>();
  if (x.scalar_type() != at::kDouble && total > 0 && depth > 0 && count > thresholds.most_pairs / total / depth) {
    select_tiles(batch, unit_x, unit_r, p, n);
    return {positive, negative};
  }
  SelectParams params{matrix_of(x),
                      matrix_of(others),
                      index_of(batch.y),
                      index_of(batch.reference_labels()),
                      depth,
                      batch.there_or_null(),
                      batch.own(),
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      p,
                      n};
  if (unit_x.defined()) {
    const auto lack = [](const at::Tensor& unit) {
      return static_cast<const char*>(unit.const_data_ptr()) + unit.size(1) * int64_t(unit.element_size());
    };
    params.inverse_x = unit_x.const_data_ptr();
    params.lack_x = lack(unit_x);
    params.inverse_r = unit_r.const_data_ptr();
    params.lack_r = lack(unit_r);
  }
  check(launch_select_pairs(params, element_of(x), stream()), "select_pairs");
  return {positive, negative};
}

std::tuple<at::Tensor, at::Tensor> select_pair(const Batch& batch, std::string_view distance, std::string_view positive,
                                               std::string_view negative) {
  const int64_t count = batch.x.size(0);
  at::Tensor p = at::empty({count}, batch.y.options()), n = at::empty({count}, batch.y.options());
  if (count == 0) return {p, n};
  const Measure measure{0, 2, 0, parse_distance(distance), false, false};
  Mined mined(batch, positive, negative, measure, Reduction::Sum);
  mined.params.selects = true;
  SelectPairParams params{};
  static_cast<MinedParams&>(params) = mined.params;
  params.positive = p.mutable_data_ptr<int64_t>();
  params.negative = n.mutable_data_ptr<int64_t>();
  check(launch_select_pair(params, element_of(batch.x), stream()), "select_pair");
  return {p, n};
}

Loss mined_forward(const Batch& batch, std::string_view positive, std::string_view negative, const Measure& measure,
                   std::string_view reduction) {
  TORCH_CHECK_VALUE(!measure.swap || negative != "all", "swap must be False where every negative is taken");
  const at::Tensor& x = batch.x;
  const Mined mined(batch, positive, negative, measure, parse_reduction(reduction));
  const int64_t count = x.size(0), total = mined.params.r.rows.rows;
  const auto acc = x.options().dtype(accumulation_type(x));
  at::Tensor loss = mined.params.reduction == Reduction::None ? at::empty({count}, acc) : at::empty({}, acc);
  at::Tensor saved = at::empty({count, saved_width(x, total)}, x.options().dtype(at::kInt));
  at::Tensor stats = at::empty({kStats}, x.options().dtype(at::kDouble));
  const at::Tensor partial = at::empty({mined_blocks(count), kMinedSums}, stats.options());
  MinedForwardParams params{};
  static_cast<MinedParams&>(params) = mined.params;
  params.loss = loss.mutable_data_ptr();
  params.stats = stats.mutable_data_ptr<double>();
  params.partial = partial.mutable_data_ptr<double>();
  params.saved = mined.entries(saved, int64_t(loss.element_size()), 0, mined.useful());
  check(launch_mined_forward(params, element_of(x), stream()), "mined_forward");
  return {loss, saved, stats};
}

// The gradients of the anchors and of the first `written` references.
std::tuple<at::Tensor, at::Tensor> mined_backward(const at::Tensor& grad, const Batch& batch, int64_t written,
                                                  const at::Tensor& saved, const at::Tensor& stats,
                                                  std::string_view positive, std::string_view negative,
                                                  const Measure& measure, std::string_view reduction) {
  TORCH_CHECK_VALUE(!measure.swap || negative != "all", "swap must be False where every negative is taken");
  const at::Tensor& x = batch.x;
  at::Tensor own = at::empty(x.sizes(), x.options());
  at::Tensor other = at::empty({written, x.size(1)}, x.options());
  const Mined mined(batch, positive, negative, measure, parse_reduction(reduction));
  const int64_t count = x.size(0), bytes = accumulation_type(x) == at::kDouble ? 8 : 4;
  const at::Tensor weight = grad.to(accumulation_type(x)).contiguous();
  MinedBackwardParams params{};
  static_cast<MinedParams&>(params) = mined.params;
  params.grad = weight.const_data_ptr();
  params.grad_stride = params.reduction == Reduction::None ? 1 : 0;
  params.stats = stats.const_data_ptr<double>();
  params.grad_x = own.mutable_data_ptr();
  params.grad_r = other.mutable_data_ptr();
  params.written = written;
  params.saved = mined.entries(saved, bytes, 0, mined.useful());
  // Whether any class is larger than what was saved only the device knows; whether one can be is known here.
  at::Tensor room, rest_x, rest_r;
  params.room.slots = 1;
  if (mined.useful() > params.saved.slots && count > 0) {
    const int64_t most =
        mined.anchor_bytes() + std::min(mined.useful(), thresholds.most_slots) * mined.entry_bytes(bytes);
    const int64_t least = mined.anchor_bytes() + mined.entry_bytes(bytes);
    const int64_t each =
        std::max(least, std::min(most, std::max(thresholds.room_bytes_each, thresholds.room_bytes / count)));
    room = at::empty({count * each}, x.options().dtype(at::kByte));
    params.room = mined.entries(room, bytes, params.saved.slots, thresholds.most_slots);
    if (x.element_size() == 2) {
      rest_x = at::empty(own.sizes(), own.options());
      rest_r = at::empty(other.sizes(), other.options());
      params.rest_x = rest_x.mutable_data_ptr();
      params.rest_r = rest_r.mutable_data_ptr();
    }
  }
  params.turns = std::numeric_limits<int64_t>::max();
  const int64_t items =
      (count + kMinedRows - 1) / kMinedRows + (params.apart ? (params.r.rows.rows + kMinedRows - 1) / kMinedRows : 0);
  const int64_t blocks = std::min<int64_t>(std::max<int64_t>(items, 1), 2 * multiprocessors());
  check(launch_mined_backward(params, element_of(x), blocks, stream()), "mined_backward");
  return {own, other};
}

}  // namespace

Loss triplet_loss_cuda(const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative, double margin,
                       std::string_view distance, double p, double eps, bool swap, bool soft_margin,
                       std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(anchor.device());
  const Measure measure{margin, p, eps, parse_distance(distance), swap, soft_margin, kSlopeAtZero};
  TripletForwardParams params{};
  static_cast<TripletParams&>(params) = explicit_params(anchor, positive, negative, measure, reduction);
  return forward(params, anchor, false);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> triplet_loss_backward_cuda(
    const at::Tensor& grad, const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative,
    const at::Tensor& distances, const at::Tensor& stats, double margin, std::string_view distance, double p,
    double eps, bool swap, bool soft_margin, std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(anchor.device());
  const Measure measure{margin, p, eps, parse_distance(distance), swap, soft_margin, kSlopeAtZero};
  ExplicitBackwardParams params{};
  static_cast<TripletParams&>(params) = explicit_params(anchor, positive, negative, measure, reduction);
  const Gradient gradient(params, grad, distances, stats);
  at::Tensor ga = at::empty(anchor.sizes(), anchor.options()), gp = at::empty(anchor.sizes(), anchor.options()),
             gn = at::empty(anchor.sizes(), anchor.options());
  params.grad_anchor = ga.mutable_data_ptr();
  params.grad_positive = gp.mutable_data_ptr();
  params.grad_negative = gn.mutable_data_ptr();
  check(launch_explicit_backward(params, element_of(anchor), stream()), "explicit_backward");
  return {ga, gp, gn};
}

Loss indexed_triplet_loss_cuda(const at::Tensor& embeddings, const OptionalTensor& references,
                               const OptionalTensor& anchor, const at::Tensor& positive, const at::Tensor& negative,
                               double margin, std::string_view distance, bool swap, bool soft_margin,
                               std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const Measure measure{margin, 2, 0, parse_distance(distance), swap, soft_margin};
  const Indexed indexed(embeddings, references, anchor, positive, negative, measure, reduction);
  TripletForwardParams params{};
  static_cast<TripletParams&>(params) = indexed.params;
  return forward(params, embeddings, true);
}

std::tuple<at::Tensor, at::Tensor> indexed_triplet_loss_backward_cuda(
    const at::Tensor& grad, const at::Tensor& embeddings, const OptionalTensor& references,
    const OptionalTensor& anchor, const at::Tensor& positive, const at::Tensor& negative, const at::Tensor& distances,
    const at::Tensor& stats, double margin, std::string_view distance, bool swap, bool soft_margin,
    std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const Measure measure{margin, 2, 0, parse_distance(distance), swap, soft_margin};
  const Indexed indexed(embeddings, references, anchor, positive, negative, measure, reduction);
  const int64_t on_x = embeddings.size(0), on_r = references ? references->size(0) : 0;
  constexpr int64_t kMostFeatures = int64_t(65535) * 32;  // what a grid can hold of single elements
  TORCH_CHECK_VALUE(embeddings.size(1) <= kMostFeatures, "embeddings must have at most ", kMostFeatures,
                    " features, got ", embeddings.size(1));
  GatherParams params{};
  static_cast<TripletParams&>(params) = indexed.params;
  const Gradient gradient(params, grad, distances, stats);
  params.apart = references.has_value();
  at::Tensor own = at::empty(embeddings.sizes(), embeddings.options());
  at::Tensor other = at::empty(references ? references->sizes() : at::IntArrayRef{0}, embeddings.options());
  params.grad_x = own.mutable_data_ptr();
  params.grad_r = other.mutable_data_ptr();

  at::Tensor units;
  if (measure.distance == Distance::Cosine) {
    units = at::empty({2, on_x + on_r}, distances.options());
    const int64_t size = int64_t(units.element_size());
    char* const inverse = static_cast<char*>(units.mutable_data_ptr());
    char* const lack = inverse + (on_x + on_r) * size;
    norms(embeddings, inverse, lack);
    if (references) norms(*references, inverse + on_x * size, lack + on_x * size);
    params.inverse = inverse;
    params.lack = lack;
  }
  at::Tensor keys, order;
  if (params.count > thresholds.most_scanned) {
    check_rows(on_x, on_x + on_r);
    const at::Tensor unsorted = at::empty({params.count * (anchor ? 3 : 2)}, embeddings.options().dtype(at::kInt));
    check(launch_keys({params, params.apart, unsorted.mutable_data_ptr<int32_t>()}, stream()), "keys");
    std::tie(keys, order) = at::sort(unsorted, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    params.keys = keys.const_data_ptr<int32_t>();
    params.order = index_of(order);
  }
  check(launch_gather(params, element_of(embeddings), stream()), "gather");
  return {own, other};
}

std::tuple<at::Tensor, at::Tensor> select_hardest_cuda(const at::Tensor& embeddings, const at::Tensor& labels,
                                                       const OptionalTensor& references,
                                                       const OptionalTensor& reference_labels,
                                                       std::optional<int64_t> reference_offset,
                                                       std::string_view distance) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  return select_hardest({embeddings, labels, references, reference_labels, reference_offset}, distance);
}

std::tuple<at::Tensor, at::Tensor> select_pair_cuda(const at::Tensor& embeddings, const at::Tensor& labels,
                                                    const OptionalTensor& references,
                                                    const OptionalTensor& reference_labels,
                                                    std::optional<int64_t> reference_offset, std::string_view distance,
                                                    std::string_view positive, std::string_view negative) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  return select_pair({embeddings, labels, references, reference_labels, reference_offset}, distance, positive,
                     negative);
}

Loss mined_triplet_loss_cuda(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
                             const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset,
                             std::string_view positive, std::string_view negative, double margin,
                             std::string_view distance, bool swap, bool soft_margin, std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  return mined_forward({embeddings, labels, references, reference_labels, reference_offset}, positive, negative,
                       {margin, 2, 0, parse_distance(distance), swap, soft_margin}, reduction);
}

std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_backward_cuda(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset, const at::Tensor& saved,
    const at::Tensor& stats, std::string_view positive, std::string_view negative, double margin,
    std::string_view distance, bool swap, bool soft_margin, std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const auto [own, other] = mined_backward(grad, {embeddings, labels, references, reference_labels, reference_offset},
                                           references ? references->size(0) : 0, saved, stats, positive, negative,
                                           {margin, 2, 0, parse_distance(distance), swap, soft_margin}, reduction);
  return {own, references ? other : at::empty({0}, own.options())};
}

// The rows of a memory are copied behind the references, and served by the kernels of those.
std::tuple<at::Tensor, at::Tensor> select_with_memory_cuda(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
    const at::Tensor& memory_count, const OptionalTensor& ids, const OptionalTensor& memory_ids,
    std::optional<int64_t> reference_offset, std::string_view distance, std::string_view positive,
    std::string_view negative) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const Batch batch(embeddings, labels, references, reference_labels, memory, memory_labels, memory_count, ids,
                    memory_ids, reference_offset);
  if (positive == "hard" && negative == "hard") return select_hardest(batch, distance);
  return select_pair(batch, distance, positive, negative);
}

Loss mined_triplet_loss_with_memory_cuda(const at::Tensor& embeddings, const at::Tensor& labels,
                                         const OptionalTensor& references, const OptionalTensor& reference_labels,
                                         const at::Tensor& memory, const at::Tensor& memory_labels,
                                         const at::Tensor& memory_count, const OptionalTensor& ids,
                                         const OptionalTensor& memory_ids, std::optional<int64_t> reference_offset,
                                         std::string_view positive, std::string_view negative, double margin,
                                         std::string_view distance, bool swap, bool soft_margin,
                                         std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const Batch batch(embeddings, labels, references, reference_labels, memory, memory_labels, memory_count, ids,
                    memory_ids, reference_offset);
  return mined_forward(batch, positive, negative, {margin, 2, 0, parse_distance(distance), swap, soft_margin},
                       reduction);
}

std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_with_memory_backward_cuda(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
    const at::Tensor& memory_count, const OptionalTensor& ids, const OptionalTensor& memory_ids,
    std::optional<int64_t> reference_offset, const at::Tensor& saved, const at::Tensor& stats,
    std::string_view positive, std::string_view negative, double margin, std::string_view distance, bool swap,
    bool soft_margin, std::string_view reduction) {
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const Batch batch(embeddings, labels, references, reference_labels, memory, memory_labels, memory_count, ids,
                    memory_ids, reference_offset);
  const int64_t written = references ? references->size(0) : embeddings.size(0);
  const auto [own, other] = mined_backward(grad, batch, written, saved, stats, positive, negative,
                                           {margin, 2, 0, parse_distance(distance), swap, soft_margin}, reduction);
  if (references) return {own, other};
  return {own.add(other), at::empty({0}, own.options())};  // the anchors are references, too
}

TORCH_LIBRARY_IMPL(triplet_ext, CUDA, m) {
  m.impl("triplet_loss", &triplet_loss_cuda);
  m.impl("triplet_loss_backward", &triplet_loss_backward_cuda);
  m.impl("indexed_triplet_loss", &indexed_triplet_loss_cuda);
  m.impl("indexed_triplet_loss_backward", &indexed_triplet_loss_backward_cuda);
  m.impl("select_hardest", &select_hardest_cuda);
  m.impl("select_pair", &select_pair_cuda);
  m.impl("mined_triplet_loss", &mined_triplet_loss_cuda);
  m.impl("mined_triplet_loss_backward", &mined_triplet_loss_backward_cuda);
  m.impl("select_with_memory", &select_with_memory_cuda);
  m.impl("mined_triplet_loss_with_memory", &mined_triplet_loss_with_memory_cuda);
  m.impl("mined_triplet_loss_with_memory_backward", &mined_triplet_loss_with_memory_backward_cuda);
}

#if defined(TRIPLET_SIMT)
// Six numbers in the order of Thresholds, or null for those that hold otherwise.
extern "C" void triplet_ext_set_thresholds(const int64_t* numbers) {
  const Thresholds otherwise;
  thresholds = numbers ? Thresholds{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]} : otherwise;
}
#endif

}  // namespace triplet_ext
