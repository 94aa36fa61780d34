// The scheduler of simt.h: blocks one after the other, their threads as fibers of one OS thread, each running until it
// has to wait for others, in random order.
//
// Compiled without -fsanitize=thread, in every build the same way: the sanitizers' entry points are weak, and called
// where they are there. For TSan this file must stay invisible: no memcpy, memset or allocation by a fiber on what
// other fibers touch, except under Quiet, for the sanitizer intercepts them here too.
#include "simt.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#define SIMT_WEAK __attribute__((weak))
extern "C" {
SIMT_WEAK void* __tsan_get_current_fiber();
SIMT_WEAK void* __tsan_create_fiber(unsigned flags);
SIMT_WEAK void __tsan_destroy_fiber(void* fiber);
SIMT_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
SIMT_WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
SIMT_WEAK void __tsan_acquire(void* p);
SIMT_WEAK void __tsan_release(void* p);
SIMT_WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
SIMT_WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
SIMT_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
SIMT_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
SIMT_WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
SIMT_WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

static uint64_t variable(const char* name, uint64_t otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}

uint64_t seed = variable("SIMT_SEED", 0);
uint64_t blocks_run, switches;

namespace {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kStack = 256 << 10, kGuard = 4 << 10;
constexpr unsigned kNoSync = 1;  // of __tsan_switch_to_fiber: the switch orders nothing

const bool tsan = __tsan_create_fiber != nullptr;
const bool asan = __sanitizer_start_switch_fiber != nullptr && !tsan;

// Memory that TSan gives out meanwhile is new to it, whoever had it before, and accesses are not seen.
struct Quiet {
  Quiet() {
    if (tsan) AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    if (tsan) AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// An object to release and acquire. Each occasion has its own, from malloc: freeing is the only way to make TSan forget
// what was released there.
struct Sync {
  int users;
};

Sync* new_sync() {
  Sync* sync = static_cast<Sync*>(malloc(sizeof(Sync)));
  sync->users = 0;
  return sync;
}

// --- state ----------------------------------------------------------------------------------------------------

// What a lane brings to a warp primitive, and takes away.
struct Lane {
  uint64_t value;
  int lane, width;
  uint32_t words[4], b[2];
  float d[4];
};

// Lanes that meet at a warp primitive.
struct Group {
  Kind kind;
  unsigned mask, arrived;
  Where where;
  Sync* sync;
};

struct Pending : Copy {
  int group;
  Where where;
};

enum State { kReady, kAtBarrier, kAtWarp, kExited };

struct Fiber {
  int index;
  State state;
  Where where;
  Group* group;  // that it waits in: its own, if it came first
  Group own;
  Lane* lane;
  Sync* sync;

  std::vector<Pending> copies;
  size_t copied;  // of those
  int committed;

  void* tsan;
  void* fenced;                // a TSan fiber that knows what this one knew at its last fence
  std::vector<void*> touched;  // by atomics since then

  char* stack;
  void* fake_stack;
#if defined(__x86_64__)
  void* context;
#else
  ucontext_t context;
#endif
};

struct {
  Fiber self;  // the thread that launches
  const void* stack;
  size_t stack_size;
  uint64_t random, launches;
  std::vector<std::unique_ptr<Fiber>> fibers;  // stacks are kept for good
  std::vector<Fiber*> ready, batch;

  void (*body)(const void*);
  const void* argument;
  const void* kernel;
  Where where;
  Sync* end;

  int threads, live;
  int waiting;  // at the barrier
  Where barrier;
  Sync* barrier_sync;
  char* shared;
  size_t shared_bytes;

  std::deque<void*> retired;  // TSan fibers of earlier blocks
} s;

Fiber* current;
std::mutex one_launch;

uint64_t random_bits() {
  uint64_t x = s.random += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

template <typename T>
void shuffle_all(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[(random_bits() >> 32) * i >> 32]);
}

// --- errors -----------------------------------------------------------------------------------------------------

const char* const kNames[] = {// of Kind
                              "__syncwarp",       "__shfl_sync",       "__shfl_xor_sync",  "__shfl_up_sync",
                              "__shfl_down_sync", "__ballot_sync",     "__any_sync",       "__all_sync",
                              "ldmatrix_x4",      "mma_m16n8k16_bf16", "mma_m16n8k16_f16", "mma_m16n8k8_tf32"};

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Where where, const char* format, ...) {
  fflush(stdout);
  fprintf(stderr, "simt: %s:%d: ", where.file, where.line);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  if (current) {
    Dl_info info{};
    const char* name = dladdr(s.kernel, &info) && info.dli_saddr == s.kernel ? info.dli_sname : nullptr;
    char* readable = name ? abi::__cxa_demangle(name, nullptr, nullptr, nullptr) : nullptr;
    fprintf(stderr, "  kernel %s launched at %s:%d, block (%u, %u, %u), thread %d (warp %d, lane %d), seed %llu\n",
            readable ? readable
            : name   ? name
                     : "?",
            s.where.file, s.where.line, blockIdx.x, blockIdx.y, blockIdx.z, current->index, current->index / kWarp,
            current->index % kWarp, (unsigned long long)seed);
  }
  abort();
}

bool same(Where a, Where b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

Fiber& running(Where where) {
  if (!current) fail(where, "device code outside of a kernel");
  return *current;
}

// --- switching ----------------------------------------------------------------------------------------------------

extern "C" void simt_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

void switch_context(Fiber& from, Fiber& to) {
  if (tsan) __tsan_switch_to_fiber(to.tsan, kNoSync);
#if defined(__x86_64__)
  simt_switch(&from.context, to.context);
#else
  swapcontext(&from.context, &to.context);
#endif
}

// From the scheduler into a fiber.
void resume(Fiber& fiber) {
  ++switches;
  current = &fiber;
  threadIdx = {unsigned(fiber.index), 0, 0};
  if (asan) __sanitizer_start_switch_fiber(&s.self.fake_stack, fiber.stack, kStack);
  switch_context(s.self, fiber);
  if (asan) __sanitizer_finish_switch_fiber(s.self.fake_stack, nullptr, nullptr);
  current = nullptr;
}

// From the running fiber into the scheduler.
void suspend() {
  Fiber& fiber = *current;
  if (asan) {
    __sanitizer_start_switch_fiber(fiber.state == kExited ? nullptr : &fiber.fake_stack, s.stack, s.stack_size);
  }
  switch_context(fiber, s.self);
  if (asan) __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void wake(Fiber& fiber) {
  fiber.state = kReady;
  s.ready.push_back(&fiber);  // never grows
}

void arrive_sync(Fiber& fiber, Sync*& sync) {
  if (!tsan) return;
  if (!sync) sync = new_sync();
  __tsan_release(sync);
  ++sync->users;
  fiber.sync = sync;
}

void leave_sync(Fiber& fiber) {
  if (!tsan) return;
  __tsan_acquire(fiber.sync);
  if (--fiber.sync->users == 0) free(fiber.sync);
}

// --- the life of a fiber ------------------------------------------------------------------------------------------

Fiber* warp_of(const Fiber& fiber, int lane) { return s.fibers[fiber.index / kWarp * kWarp + lane].get(); }

int lanes_of(const Fiber& fiber) { return std::min(kWarp, s.threads - fiber.index / kWarp * kWarp); }

// A lane of the warp that waits for this one at a warp primitive.
Fiber* waits_for(const Fiber& fiber) {
  for (int l = 0; l < lanes_of(fiber); ++l) {
    Fiber* other = warp_of(fiber, l);
    if (other->state == kAtWarp && other->group->mask >> fiber.index % kWarp & 1) return other;
  }
  return nullptr;
}

void leave(Fiber& fiber) {
  if (!fiber.copies.empty()) {
    fail(fiber.copies[fiber.copied].where, "cp_async_16 without a cp_async_wait before the thread exits");
  }
  if (s.waiting > 0) {
    fail(s.barrier, "divergent __syncthreads: %d threads wait here while another exits", s.waiting);
  }
  if (const Fiber* other = waits_for(fiber)) {
    fail(other->where, "%s with mask 0x%08x waits for lane %d, which exits", kNames[other->group->kind],
         other->group->mask, fiber.index % kWarp);
  }
  fiber.state = kExited;
  --s.live;
}

void enter() {
  Fiber& fiber = *current;
  if (asan) __sanitizer_finish_switch_fiber(nullptr, &s.stack, &s.stack_size);
  s.body(s.argument);
  leave(fiber);
  if (tsan) __tsan_release(s.end);
  suspend();
  abort();
}

void map_stack(Fiber& fiber) {
  if (!fiber.stack) {
    void* p = mmap(nullptr, kGuard + kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) perror("simt: mmap"), abort();
    fiber.stack = static_cast<char*>(p) + kGuard;
  } else if (!tsan) {
    return;
  }
  // TSan has to forget the former owner.
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(fiber.stack, kStack, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) perror("simt: mmap"), abort();
}

void start(Fiber& fiber, int index) {
  fiber.index = index;
  fiber.state = kReady;
  fiber.copied = 0;
  fiber.committed = 0;
  fiber.fake_stack = nullptr;
  {
    Quiet quiet;
    fiber.copies = {};
    fiber.touched = {};
    map_stack(fiber);
  }
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // enter's return address
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
#endif
  if (tsan) {
    fiber.tsan = __tsan_create_fiber(0);  // after all that the launching thread did
    fiber.fenced = nullptr;
    char name[64];
    snprintf(name, sizeof name, "block %u %u %u thread %d", blockIdx.x, blockIdx.y, blockIdx.z, index);
    __tsan_set_fiber_name(fiber.tsan, name);
  }
}

// --- warp primitives ----------------------------------------------------------------------------------------------

float tf32(uint32_t word) { return __uint_as_float(word & 0xffffe000); }

float half_of(Kind kind, uint32_t word, int i) {
  const unsigned short bits = (unsigned short)(word >> 16 * i);
  return kind == kMmaF16 ? __half2float({bits}) : __bfloat162float({bits});
}

// Fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "for mma.m16n8k8".
void multiply(Kind kind, Lane* const (&lanes)[kWarp]) {
  const int depth = kind == kMmaTf32 ? 8 : 16;
  double a[16][16], b[8][16];
  for (int l = 0; l < kWarp; ++l) {
    const Lane& lane = *lanes[l];
    const int row = l / 4, k = l % 4;
    for (int r = 0; r < 4; ++r) {
      if (kind == kMmaTf32) {
        a[row + r % 2 * 8][k + r / 2 * 4] = tf32(lane.words[r]);
        if (r < 2) b[row][k + r * 4] = tf32(lane.b[r]);
        continue;
      }
      for (int i = 0; i < 2; ++i) {
        a[row + r % 2 * 8][k * 2 + i + r / 2 * 8] = half_of(kind, lane.words[r], i);
        if (r < 2) b[row][k * 2 + i + r * 8] = half_of(kind, lane.b[r], i);
      }
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      float sum = lanes[l]->d[i];
      for (int k = 0; k < depth; ++k) sum = float(double(sum) + a[row][k] * b[column][k]);
      lanes[l]->d[i] = sum;
    }
  }
}

int source_of(Kind kind, const Lane& lane, int l) {
  const int first = l & ~(lane.width - 1), end = first + lane.width;
  switch (kind) {
    case kShuffle:
      return first + (lane.lane & (lane.width - 1));
    case kShuffleXor:
      return (l ^ lane.lane) < end ? l ^ lane.lane : l;
    case kShuffleUp:
      return l - lane.lane >= first ? l - lane.lane : l;
    default:
      return l + lane.lane < end ? l + lane.lane : l;
  }
}

// All results at once: a lane may be far ahead when another looks.
void complete(const Group& group, Lane* const (&lanes)[kWarp]) {
  uint64_t results[kWarp];
  unsigned votes = 0;
  for (int l = 0; l < kWarp; ++l) {
    if (group.mask >> l & 1 && lanes[l]->value) votes |= 1u << l;
  }
  switch (group.kind) {
    case kSyncWarp:
      return;
    case kLdmatrix: {
      uint32_t rows[kWarp][4];
      for (int l = 0; l < kWarp; ++l) {
        for (int i = 0; i < 4; ++i) rows[l][i] = lanes[l]->words[i];
      }
      for (int l = 0; l < kWarp; ++l) {
        for (int m = 0; m < 4; ++m) lanes[l]->words[m] = rows[m * 8 + l / 4][l % 4];
      }
      return;
    }
    case kMmaBf16:
    case kMmaF16:
    case kMmaTf32:
      return multiply(group.kind, lanes);
    case kBallot:
    case kAny:
    case kAll:
      for (int l = 0; l < kWarp; ++l) {
        if (!(group.mask >> l & 1)) continue;
        lanes[l]->value = group.kind == kBallot ? votes : group.kind == kAny ? votes != 0 : votes == group.mask;
      }
      return;
    default:
      for (int l = 0; l < kWarp; ++l) {
        if (!(group.mask >> l & 1)) continue;
        const int source = source_of(group.kind, *lanes[l], l);
        if (source < 0 || source >= kWarp || !(group.mask >> source & 1)) {
          fail(group.where, "%s: lane %d reads from lane %d, which mask 0x%08x does not name", kNames[group.kind], l,
               source, group.mask);
        }
        results[l] = lanes[source]->value;
      }
      for (int l = 0; l < kWarp; ++l) {
        if (group.mask >> l & 1) lanes[l]->value = results[l];
      }
  }
}

void meet(Kind kind, unsigned mask, Where where, Lane& lane) {
  Fiber& fiber = running(where);
  const int self = fiber.index % kWarp, lanes = lanes_of(fiber);
  if (!(mask >> self & 1)) fail(where, "%s: lane %d is not in its own mask 0x%08x", kNames[kind], self, mask);
  Group* group = nullptr;
  for (int l = 0; l < kWarp; ++l) {
    if (l == self || !(mask >> l & 1)) continue;
    if (l >= lanes) fail(where, "%s: mask 0x%08x names lane %d, which does not exist", kNames[kind], mask, l);
    const Fiber& other = *warp_of(fiber, l);
    if (other.state == kExited) {
      fail(where, "%s: mask 0x%08x names lane %d, which has exited", kNames[kind], mask, l);
    }
    if (other.state == kAtBarrier) {
      fail(where, "%s: mask 0x%08x names lane %d, which waits in __syncthreads at %s:%d", kNames[kind], mask, l,
           other.where.file, other.where.line);
    }
    if (other.state != kAtWarp || !(other.group->mask >> self & 1)) continue;
    Group& met = *other.group;
    if (met.kind != kind || met.mask != mask || !same(met.where, where)) {
      fail(where, "%s with mask 0x%08x, but lane %d is in %s with mask 0x%08x at %s:%d", kNames[kind], mask, l,
           kNames[met.kind], met.mask, met.where.file, met.where.line);
    }
    group = &met;
  }
  if (!group) {
    group = &fiber.own;
    group->kind = kind;
    group->mask = mask;
    group->arrived = 0;
    group->where = where;
    group->sync = nullptr;
  }
  group->arrived |= 1u << self;
  fiber.state = kAtWarp;
  fiber.where = where;
  fiber.group = group;
  fiber.lane = &lane;
  if (kind == kSyncWarp) arrive_sync(fiber, group->sync);
  if (group->arrived == mask) {
    Lane* all[kWarp];
    for (int l = 0; l < kWarp; ++l) all[l] = mask >> l & 1 ? warp_of(fiber, l)->lane : nullptr;
    complete(*group, all);
    for (int l = 0; l < kWarp; ++l) {
      if (mask >> l & 1) wake(*warp_of(fiber, l));
    }
  }
  suspend();
  if (kind == kSyncWarp) leave_sync(fiber);
}

// --- blocks -------------------------------------------------------------------------------------------------------

// Runs from the back. Lowest first, highest first, or any order.
void order(std::vector<Fiber*>& fibers) {
  const auto lower = [](const Fiber* x, const Fiber* y) { return x->index < y->index; };
  switch (random_bits() >> 62) {
    case 0:
      return std::sort(fibers.begin(), fibers.end(), lower);
    case 1:
      return std::sort(fibers.rbegin(), fibers.rend(), lower);
    default:
      return shuffle_all(fibers);
  }
}

[[noreturn]] void deadlock() {
  for (int i = 0; i < s.threads; ++i) {
    Fiber& fiber = *s.fibers[i];
    if (fiber.state == kExited) continue;
    current = &fiber;
    if (fiber.state == kAtWarp) {
      fail(fiber.where, "deadlock: nobody can run; %d threads wait, one of them here in %s with mask 0x%08x", s.live,
           kNames[fiber.group->kind], fiber.group->mask);
    }
    fail(fiber.where, "deadlock: nobody can run; %d threads wait, one of them here in __syncthreads", s.live);
  }
  abort();
}

void renew_shared() {
  Quiet quiet;
  if (tsan || !s.shared) {
    free(s.shared);
    void* p = nullptr;
    if (posix_memalign(&p, 16, std::max<size_t>(s.shared_bytes, 1)) != 0) abort();
    s.shared = static_cast<char*>(p);
  }
  memset(s.shared, 0xff, s.shared_bytes);
}

// A new TSan fiber that gets a dead one's number passes for it, and its clock would order everything behind the dead
// one's accesses: races between blocks are seen as long as the fibers of both are kept.
void retire(void* fiber) {
  static const uint64_t limit = variable("SIMT_TSAN_FIBERS", 1024);
  s.retired.push_back(fiber);
  while (s.retired.size() > limit) {
    __tsan_destroy_fiber(s.retired.front());
    s.retired.pop_front();
  }
}

void run_block() {
  ++blocks_run;
  renew_shared();
  s.ready.clear();
  s.live = s.threads;
  s.waiting = 0;
  s.barrier_sync = nullptr;
  for (int i = 0; i < s.threads; ++i) {
    start(*s.fibers[i], i);
    s.ready.push_back(s.fibers[i].get());
  }
  while (s.live > 0) {
    if (s.ready.empty()) deadlock();
    s.batch.swap(s.ready);
    order(s.batch);
    const bool ahead = random_bits() >> 63;  // whoever can run on does, while others have not begun
    while (!s.batch.empty()) {
      Fiber* fiber = s.batch.back();
      s.batch.pop_back();
      resume(*fiber);
      if (ahead && !s.batch.empty() && !s.ready.empty()) {
        shuffle_all(s.ready);
        s.batch.insert(s.batch.end(), s.ready.begin(), s.ready.end());
        s.ready.clear();
      }
    }
  }
  if (!tsan) return;
  for (int i = 0; i < s.threads; ++i) {
    retire(s.fibers[i]->tsan);
    if (s.fibers[i]->fenced) retire(s.fibers[i]->fenced);
  }
}

}  // namespace

// --- interface ----------------------------------------------------------------------------------------------------

void barrier(Where where) {
  Fiber& fiber = running(where);
  if (s.live < s.threads) {
    fail(where, "divergent __syncthreads: %d threads of the block have exited", s.threads - s.live);
  }
  if (s.waiting > 0 && !same(s.barrier, where)) {
    fail(where, "divergent __syncthreads: %d threads wait in another one at %s:%d", s.waiting, s.barrier.file,
         s.barrier.line);
  }
  if (const Fiber* other = waits_for(fiber)) {
    fail(where, "__syncthreads while lane %d waits for lane %d in %s with mask 0x%08x at %s:%d", other->index % kWarp,
         fiber.index % kWarp, kNames[other->group->kind], other->group->mask, other->where.file, other->where.line);
  }
  s.barrier = where;
  fiber.state = kAtBarrier;
  fiber.where = where;
  arrive_sync(fiber, s.barrier_sync);
  if (++s.waiting == s.threads) {
    s.waiting = 0;
    s.barrier_sync = nullptr;
    for (int i = 0; i < s.threads; ++i) wake(*s.fibers[i]);
  }
  suspend();
  leave_sync(fiber);
}

void sync_warp(unsigned mask, Where where) {
  Lane lane{};
  meet(kSyncWarp, mask, where, lane);
}

uint64_t shuffle(Kind kind, unsigned mask, uint64_t value, int lane, int width, Where where) {
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    fail(where, "%s: width %d is not a power of two up to 32", kNames[kind], width);
  }
  Lane payload{};
  payload.value = value;
  payload.lane = lane;
  payload.width = width;
  meet(kind, mask, where, payload);
  return payload.value;
}

unsigned vote(Kind kind, unsigned mask, bool predicate, Where where) {
  Lane payload{};
  payload.value = predicate;
  meet(kind, mask, where, payload);
  return unsigned(payload.value);
}

void ldmatrix(const uint32_t (&row)[4], uint32_t (&out)[4], Where where) {
  Lane payload{};
  for (int i = 0; i < 4; ++i) payload.words[i] = row[i];
  meet(kLdmatrix, ~0u, where, payload);
  for (int i = 0; i < 4; ++i) out[i] = payload.words[i];
}

void mma(Kind kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where) {
  Lane payload{};
  for (int i = 0; i < 4; ++i) payload.words[i] = a[i], payload.d[i] = d[i];
  payload.b[0] = b0;
  payload.b[1] = b1;
  meet(kind, ~0u, where, payload);
  for (int i = 0; i < 4; ++i) d[i] = payload.d[i];
}

// An atomic publishes what its thread knew at its last fence, not what it did since.
void atomic(const volatile void* p) {
  if (!tsan || !current) return;
  Fiber& fiber = *current;
  void* address = const_cast<void*>(p);
  if (fiber.fenced) {
    __tsan_switch_to_fiber(fiber.fenced, kNoSync);
    __tsan_release(address);
    __tsan_switch_to_fiber(fiber.tsan, kNoSync);
  }
  if (std::find(fiber.touched.begin(), fiber.touched.end(), address) == fiber.touched.end()) {
    const Quiet quiet;
    fiber.touched.push_back(address);
  }
}

// And a fence takes in what was published where the thread's atomics have been.
void fence(Where where) {
  Fiber& fiber = running(where);
  if (!tsan) return;
  for (void* address : fiber.touched) __tsan_acquire(address);
  fiber.touched.clear();
  if (!fiber.fenced) {
    fiber.fenced = __tsan_create_fiber(0);  // knows what its creator does
    return;
  }
  Sync* sync = new_sync();
  __tsan_release(sync);
  __tsan_switch_to_fiber(fiber.fenced, kNoSync);
  __tsan_acquire(sync);
  __tsan_switch_to_fiber(fiber.tsan, kNoSync);
  free(sync);
}

void wait(Where where) { fail(where, "waits for what no block before has done"); }

void* shared(size_t size, Where where) {
  running(where);
  if (size > s.shared_bytes) {
    fail(where, "%zu bytes of shared memory, but the launch asked for %zu", size, s.shared_bytes);
  }
  return s.shared;
}

static bool in_shared(const void* p, size_t size) {
  const uintptr_t offset = uintptr_t(p) - uintptr_t(s.shared);
  return offset <= s.shared_bytes && size <= s.shared_bytes - offset;
}

void check_row(const void* row, Where where) {
  running(where);
  if (uintptr_t(row) % 16 != 0) fail(where, "ldmatrix_x4: the row %p is not aligned to 16 bytes", row);
  if (!in_shared(row, 16)) fail(where, "ldmatrix_x4: the row %p is not in shared memory", row);
}

void begin_copy(void* to, const void* from, Where where) {
  Fiber& fiber = running(where);
  if (uintptr_t(to) % 16 != 0) fail(where, "cp_async_16: the destination %p is not aligned to 16 bytes", to);
  if (uintptr_t(from) % 16 != 0) fail(where, "cp_async_16: the source %p is not aligned to 16 bytes", from);
  if (!in_shared(to, 16)) fail(where, "cp_async_16: the destination %p is not in shared memory", to);
  if (in_shared(from, 1)) fail(where, "cp_async_16: the source %p is in shared memory", from);
  Pending copy;
  copy.to = to;
  copy.from = from;
  copy.group = fiber.committed;
  copy.where = where;
  const Quiet quiet;
  fiber.copies.push_back(copy);
}

void commit_copies(Where where) { ++running(where).committed; }

bool next_copy(int pending, Copy* copy, Where where) {
  Fiber& fiber = running(where);
  if (fiber.copied == fiber.copies.size()) return false;
  const Pending& next = fiber.copies[fiber.copied];
  if (next.group >= fiber.committed - pending) return false;
  copy->to = next.to;
  copy->from = next.from;
  if (++fiber.copied == fiber.copies.size()) {
    fiber.copies.clear();
    fiber.copied = 0;
  }
  return true;
}

cudaError_t run(void (*body)(const void*), const void* context, const void* kernel, dim3 grid, unsigned threads,
                size_t shared_bytes, Where where) {
  if (current) fail(where, "a launch inside of a kernel");
  if (threads < 1 || threads > kMaxThreads || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff ||
      grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > kMaxShared) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(one_launch);
  s.body = body;
  s.argument = context;
  s.kernel = kernel;
  s.where = where;
  s.threads = int(threads);
  s.shared_bytes = shared_bytes;
  s.random = seed * 0xd1342543de82ef95 + ++s.launches;
  s.ready.reserve(kMaxThreads);
  s.batch.reserve(kMaxThreads);
  while (s.fibers.size() < threads) s.fibers.push_back(std::make_unique<Fiber>());
  blockDim = dim3(threads);
  gridDim = grid;
  if (tsan) {
    s.self.tsan = __tsan_get_current_fiber();
    s.end = new_sync();
  }
  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  shuffle_all(blocks);
  for (const uint64_t block : blocks) {
    blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
    run_block();
  }
  {
    Quiet quiet;
    free(s.shared);
    s.shared = nullptr;
  }
  if (tsan) {
    for (void* fiber : s.retired) __tsan_destroy_fiber(fiber);
    s.retired.clear();
    __tsan_acquire(s.end);
    free(s.end);
  }
  return cudaSuccess;
}

}  // namespace simt
