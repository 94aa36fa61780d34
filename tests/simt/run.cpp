// Runs one operator's kernels under the shim: reads named arrays, writes named arrays. What launch.cpp does with
// torch's sort and allocator is done here with the C++ library's.
//
// A file holds entries "name bytes\n" followed by that many bytes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "../../csrc/cuda/params.h"
#include "simt.h"

using namespace triplet_ext;

namespace {

std::map<std::string, std::vector<char>> input;

void read_input(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string name;
  size_t bytes;
  while (file >> name >> bytes) {
    file.get();
    std::vector<char>& data = input[name];
    data.resize(bytes);
    file.read(data.data(), std::streamsize(bytes));
  }
}

bool has(const std::string& name) { return input.count(name) != 0; }

template <typename T>
T* array(const std::string& name) {
  // As torch, which has no pointer to what is empty.
  return has(name) && !input.at(name).empty() ? reinterpret_cast<T*>(input.at(name).data()) : nullptr;
}

int64_t integer(const std::string& name) { return *array<int64_t>(name); }
double number(const std::string& name) { return *array<double>(name); }

// Uninitialised memory of its own, for the sanitizers to watch; poisoned, for the values to show.
struct Room {
  size_t bytes;
  unsigned char* data;
  explicit Room(size_t bytes, int fill = 0xff) : bytes(bytes), data(new unsigned char[bytes ? bytes : 1]) {
    memset(data, fill, bytes);
  }
  ~Room() { delete[] data; }
  Room(const Room&) = delete;
};

std::ofstream output;

void put(const std::string& name, const Room& room) {
  output << name << ' ' << room.bytes << '\n';
  output.write(reinterpret_cast<const char*>(room.data), std::streamsize(room.bytes));
}

// data, and in .shape: rows, row stride, column stride, offset of the first element, elements' size.
Matrix matrix(const std::string& name) {
  const int64_t* shape = array<int64_t>(name + ".shape");
  return {array<char>(name) + shape[3] * shape[4], shape[0], shape[1], shape[2]};
}

Measure measure() {
  return {number("margin"),
          number("p"),
          number("eps"),
          Distance(integer("distance")),
          integer("swap") != 0,
          integer("soft") != 0,
          0};
}

Element element() { return Element(integer("element")); }
size_t accumulator() { return element() == Element::Float64 ? 8 : 4; }
size_t size_of_element() { return element() == Element::Float64 ? 8 : element() == Element::Float32 ? 4 : 2; }

void check(int error) {
  if (error == 0) return;
  fprintf(stderr, "a launch failed: %d\n", error);
  exit(4);
}

TripletParams triplets() {
  const bool apart = has("references");
  TripletParams params{};
  params.anchor = matrix("anchor");
  params.positive = matrix(has("positive") ? "positive" : apart ? "references" : "anchor");
  params.negative = matrix(has("negative") ? "negative" : apart ? "references" : "anchor");
  params.a = array<int64_t>("index_a");
  params.p = array<int64_t>("index_p");
  params.n = array<int64_t>("index_n");
  params.mined = has("index_p") && !has("index_a");
  params.count = integer("count");
  params.depth = integer("depth");
  params.measure = measure();
  params.reduction = Reduction(integer("reduction"));
  return params;
}

void norms(const Matrix& x, Room& unit, int64_t at, int64_t total) {
  const int64_t size = int64_t(accumulator());
  check(
      launch_norms({x, integer("depth"), unit.data + at * size, unit.data + (total + at) * size}, element(), nullptr));
}

// Forward and backward of the triplets.
void losses() {
  const TripletParams params = triplets();
  const int64_t count = params.count, depth = params.depth, acc = int64_t(accumulator());
  const bool none = params.reduction == Reduction::None;
  Room loss((none ? count : 1) * acc), distances((params.measure.swap ? 3 : 2) * count * acc), stats(8 * kStats);
  Room partial(triplet_blocks(count) * kStats * 8);
  Room ticket(4, 0), met(4 * ((params.anchor.rows + 31) / 32), 0);
  TripletForwardParams forward{};
  static_cast<TripletParams&>(forward) = params;
  forward.distances = distances.data;
  forward.loss = loss.data;
  forward.stats = reinterpret_cast<double*>(stats.data);
  forward.partial = reinterpret_cast<double*>(partial.data);
  forward.ticket = reinterpret_cast<unsigned*>(ticket.data);
  if (has("index_a")) forward.met = reinterpret_cast<unsigned*>(met.data);
  check(launch_triplet_forward(forward, element(), nullptr));
  put("loss", loss);
  put("distances", distances);
  put("stats", stats);

  TripletBackwardParams backward{};
  static_cast<TripletParams&>(backward) = params;
  backward.distances = distances.data;
  backward.grad = array<char>("grad");
  backward.grad_stride = none ? 1 : 0;
  backward.stats = forward.stats;
  const size_t size = size_of_element();
  if (!has("index_p")) {
    Room a(count * depth * size), p(count * depth * size), n(count * depth * size);
    ExplicitBackwardParams explicit_backward{};
    static_cast<TripletBackwardParams&>(explicit_backward) = backward;
    explicit_backward.grad_anchor = a.data;
    explicit_backward.grad_positive = p.data;
    explicit_backward.grad_negative = n.data;
    check(launch_explicit_backward(explicit_backward, element(), nullptr));
    put("grad0", a);
    put("grad1", p);
    put("grad2", n);
    return;
  }
  const bool apart = has("references");
  const int64_t on_x = params.anchor.rows, on_r = apart ? params.positive.rows : 0;
  GatherParams gather{};
  static_cast<TripletBackwardParams&>(gather) = backward;
  gather.apart = apart;
  Room x(on_x * depth * size), r(on_r * depth * size), unit(2 * (on_x + on_r) * acc);
  gather.grad_x = x.data;
  gather.grad_r = r.data;
  if (params.measure.distance == Distance::Cosine) {
    norms(params.anchor, unit, 0, on_x + on_r);
    if (apart) norms(params.positive, unit, on_x, on_x + on_r);
    gather.inverse = unit.data;
    gather.lack = unit.data + (on_x + on_r) * acc;
  }
  const int64_t entries = count * (params.mined ? 2 : 3);
  Room unsorted(4 * entries), keys(4 * entries), order(8 * entries);
  if (integer("sorted")) {
    auto* const key = reinterpret_cast<int32_t*>(unsorted.data);
    check(launch_keys({params, apart, key}, nullptr));
    std::vector<int64_t> by_key(entries);
    std::iota(by_key.begin(), by_key.end(), 0);
    std::stable_sort(by_key.begin(), by_key.end(), [&](int64_t l, int64_t m) { return key[l] < key[m]; });
    for (int64_t e = 0; e < entries; ++e) {
      reinterpret_cast<int32_t*>(keys.data)[e] = key[by_key[e]];
      reinterpret_cast<int64_t*>(order.data)[e] = by_key[e];
    }
    gather.keys = reinterpret_cast<int32_t*>(keys.data);
    gather.order = reinterpret_cast<int64_t*>(order.data);
  }
  check(launch_gather(gather, element(), nullptr));
  put("grad0", x);
  if (apart) put("grad1", r);
}

// One side's tensors for the tiles.
struct Side {
  std::vector<int64_t> labels, order;
  Room packed, bias, finite, range;
  TileSide params;

  static int64_t padded(const Matrix& x) { return (x.rows + kTileRows - 1) / kTileRows * kTileRows; }

  Side(const Matrix& x, const int64_t* given, int64_t packed_bytes, const float* inverse, const float* lack)
      : labels(given, given + x.rows),
        order(x.rows),
        packed(padded(x) * packed_bytes),
        bias(4 * padded(x)),
        finite(x.rows),
        range(8 * padded(x)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t l, int64_t m) { return given[l] < given[m]; });
    std::sort(labels.begin(), labels.end());
    auto* const low = reinterpret_cast<int32_t*>(range.data);
    params = {x,           labels.data(), order.data(),   inverse,     lack,
              x.rows,      padded(x),     nullptr,        packed.data, reinterpret_cast<float*>(bias.data),
              finite.data, low,           low + padded(x)};
  }
};

void selection() {
  const bool apart = has("references"), cosine = Distance(integer("distance")) == Distance::Cosine;
  const Matrix x = matrix("anchor"), r = apart ? matrix("references") : x;
  const int64_t* const y = array<int64_t>("labels");
  const int64_t* const z = apart ? array<int64_t>("reference_labels") : y;
  const int64_t offset = apart ? has("offset") ? integer("offset") : kNobody : 0, depth = integer("depth");
  const int64_t acc = int64_t(accumulator());
  Room positive(8 * x.rows), negative(8 * x.rows), unit_x(2 * x.rows * acc), unit_r(2 * r.rows * acc);
  auto* const p = reinterpret_cast<int64_t*>(positive.data);
  auto* const n = reinterpret_cast<int64_t*>(negative.data);
  const void *inverse_x = nullptr, *lack_x = nullptr, *inverse_r = nullptr, *lack_r = nullptr;
  if (cosine) {
    norms(x, unit_x, 0, x.rows);
    norms(r, unit_r, 0, r.rows);
    inverse_x = unit_x.data;
    lack_x = unit_x.data + x.rows * acc;
    inverse_r = unit_r.data;
    lack_r = unit_r.data + r.rows * acc;
  }
  if (!has("products")) {
    check(launch_select_pairs(
        {x, r, y, z, depth, nullptr, {offset, nullptr, nullptr}, inverse_x, lack_x, inverse_r, lack_r, p, n}, element(),
        nullptr));
  } else {
    const auto products = Products(integer("products"));
    const int64_t width = products == Products::Float32 || products == Products::TF32 ? 4 : 2;
    const int64_t packed_bytes = (depth * width + kTileChunk - 1) / kTileChunk * kTileChunk;
    const auto f = [](const void* pointer) { return static_cast<const float*>(pointer); };
    const Side anchors(x, y, packed_bytes, f(inverse_x), f(lack_x));
    const Side others(r, z, packed_bytes, f(inverse_r), f(lack_r));
    Room shift(4 * (depth + 1)), keys(16 * x.rows, 0), bad(4, 0);
    auto* const near = reinterpret_cast<unsigned long long*>(keys.data);
    check(launch_select_tiles({anchors.params,
                               apart ? others.params : anchors.params,
                               !apart,
                               products,
                               depth,
                               packed_bytes,
                               {offset, nullptr, nullptr},
                               reinterpret_cast<float*>(shift.data),
                               near,
                               near + x.rows,
                               reinterpret_cast<unsigned*>(bad.data),
                               p,
                               n,
                               int(integer("blocks"))},
                              element(), nullptr));
  }
  put("positive", positive);
  put("negative", negative);
}

// One side of a strategy's batch.
struct Ordered {
  std::vector<int64_t> labels, order;
  Room finite, unit;
  MinedSide params;

  Ordered(const Matrix& x, const int64_t* given, bool cosine)
      : labels(given, given + x.rows), order(x.rows), finite(x.rows), unit(cosine ? 2 * x.rows * accumulator() : 0) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t l, int64_t m) { return given[l] < given[m]; });
    std::sort(labels.begin(), labels.end());
    if (cosine) norms(x, unit, 0, x.rows);
    params = {x,
              labels.data(),
              order.data(),
              given,
              cosine ? unit.data : nullptr,
              cosine ? unit.data + x.rows * int64_t(accumulator()) : nullptr,
              finite.data,
              nullptr};
  }
};

// Room for so many entries, as launch.cpp lays them out.
struct EntryRoom {
  Room a, b, n, chosen;
  Entries params;

  EntryRoom(int64_t count, int64_t first, int64_t slots, bool one, bool single)
      : a(slots * count * accumulator()),
        b(slots * count * accumulator()),
        n(one ? 4 * slots * count : 0),
        chosen(single ? 4 * count : 0) {
    params = {a.data,
              b.data,
              one ? reinterpret_cast<int32_t*>(n.data) : nullptr,
              single ? reinterpret_cast<int32_t*>(chosen.data) : nullptr,
              first,
              slots};
  }
};

// Every other strategy: a selection, or forward and backward.
void strategy() {
  const bool apart = has("references"), cosine = Distance(integer("distance")) == Distance::Cosine;
  const Matrix x = matrix("anchor"), r = apart ? matrix("references") : x;
  const int64_t* const y = array<int64_t>("labels");
  const Ordered anchors(x, y, cosine);
  const Ordered others(r, apart ? array<int64_t>("reference_labels") : y, cosine);
  const int64_t depth = integer("depth");
  const auto positive = PositiveRule(integer("rule_p"));
  const auto negative = NegativeRule(integer("rule_n"));
  const bool single = positive != PositiveRule::All, one = negative != NegativeRule::All;
  Room reach(sizeof(Reach) * x.rows), itself(4 * x.rows), bad(x.rows), most(4 * ((x.rows + 31) / 32)),
      counters(4 * kMinedCounters, 0);
  MinedParams params{};
  params.x = anchors.params;
  params.r = apart ? others.params : anchors.params;
  params.apart = apart;
  params.selects = single && one;
  params.depth = depth;
  params.own = {apart ? has("offset") ? integer("offset") : kNobody : 0, nullptr, nullptr};
  params.positive = positive;
  params.negative = negative;
  params.measure = measure();
  params.reduction = Reduction(integer("reduction"));
  params.reach = reinterpret_cast<Reach*>(reach.data);
  params.itself = reinterpret_cast<int32_t*>(itself.data);
  params.bad = bad.data;
  params.most = reinterpret_cast<int32_t*>(most.data);
  params.counters = reinterpret_cast<unsigned*>(counters.data);
  params.chunk = integer("chunk");
  if (params.selects) {
    Room p(8 * x.rows), n(8 * x.rows);
    SelectPairParams select{};
    static_cast<MinedParams&>(select) = params;
    select.positive = reinterpret_cast<int64_t*>(p.data);
    select.negative = reinterpret_cast<int64_t*>(n.data);
    check(launch_select_pair(select, element(), nullptr));
    put("positive", p);
    put("negative", n);
    return;
  }
  const bool none = params.reduction == Reduction::None;
  Room loss((none ? x.rows : 1) * accumulator()), stats(8 * kStats), partial(mined_blocks(x.rows) * kMinedSums * 8);
  const int64_t saved_slots = integer("saved"), room_slots = integer("room");
  const EntryRoom saved(x.rows, 0, saved_slots, one, single), room(x.rows, saved_slots, room_slots, one, single);
  MinedForwardParams forward{};
  static_cast<MinedParams&>(forward) = params;
  forward.loss = loss.data;
  forward.stats = reinterpret_cast<double*>(stats.data);
  forward.partial = reinterpret_cast<double*>(partial.data);
  forward.saved = saved.params;
  check(launch_mined_forward(forward, element(), nullptr));
  put("loss", loss);
  put("stats", stats);

  const int64_t size = int64_t(size_of_element()), on_r = apart ? r.rows : 0;
  Room grad_x(x.rows * depth * size), grad_r(on_r * depth * size), rest_x(grad_x.bytes), rest_r(grad_r.bytes);
  memset(counters.data, 0, counters.bytes);
  MinedBackwardParams backward{};
  static_cast<MinedParams&>(backward) = params;
  backward.grad = array<char>("grad");
  backward.grad_stride = none ? 1 : 0;
  backward.stats = forward.stats;
  backward.grad_x = grad_x.data;
  backward.grad_r = grad_r.data;
  backward.written = on_r;
  backward.rest_x = size == 2 ? rest_x.data : nullptr;
  backward.rest_r = size == 2 ? rest_r.data : nullptr;
  backward.saved = saved.params;
  backward.room = room.params;
  backward.turns = integer("turns");
  check(launch_mined_backward(backward, element(), integer("blocks"), nullptr));
  put("grad0", grad_x);
  if (apart) put("grad1", grad_r);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    fprintf(stderr, "usage: %s INPUT OUTPUT\n", arguments[0]);
    return 2;
  }
  read_input(arguments[1]);
  output.open(arguments[2], std::ios::binary);
  if (has("rule_p")) strategy();
  else if (has("labels")) selection();
  else losses();
  return 0;
}
