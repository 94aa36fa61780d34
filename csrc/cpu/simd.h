// Vectors of the instruction set that a translation unit is compiled for, by the compiler's vector extension.
// Included by isa.h only, after the instruction set was chosen.

#if defined(TRIPLET_ISA_AVX512)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;  // 8 x 2 accumulators of the 32 registers; the rest serves the visitor
constexpr int kTileVectors = 2;
#elif defined(TRIPLET_ISA_AVX2)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 4;  // 4 x 3 accumulators, 3 columns and 1 broadcast: the 16 registers
constexpr int kTileVectors = 3;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 2;  // 2 x 4 accumulators
constexpr int kTileVectors = 4;
#endif

#define TRIPLET_INLINE static inline __attribute__((always_inline))

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t M __attribute__((vector_size(kVectorBytes)));  // masks and indices
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Lane;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t M __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Lane;
};

template <typename T>
constexpr int kWidth = kVectorBytes / int(sizeof(T));
template <typename T>
constexpr int kPanel = kTileVectors * kWidth<T>;  // rows of a packed panel
static_assert(kPanel<float> % kTileRows == 0 && kPanel<double> % kTileRows == 0, "panels hold whole tiles");

template <typename T>
TRIPLET_INLINE typename Simd<T>::V load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <typename T>
TRIPLET_INLINE void store(T* p, typename Simd<T>::V v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
template <typename T>
TRIPLET_INLINE typename Simd<T>::V broadcast(T x) {
  return typename Simd<T>::V{} + x;
}
// The value, rounded: the compiler, which does not look through it, can't contract a product with what it is added to.
template <typename V>
TRIPLET_INLINE V rounded(V value) {
#if defined(TRIPLET_ISA_AVX512)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
}
template <typename V>
TRIPLET_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
TRIPLET_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}
// The sum of the lanes, pairwise.
template <typename T>
TRIPLET_INLINE T sum(typename Simd<T>::V v) {
  T lanes[kWidth<T>];
  store(lanes, v);
  for (int half = kWidth<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
