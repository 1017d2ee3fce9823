// Tangents of LoRA-factor gradients on the CPU. See lora_grad_tangent.h for what is computed, lora_grad_tiles.h for
// how.
//
// The factors of a group are taken once for all directions; what moves is read once.
#include "kernels/lora_grad_tangent.h"

#include "kernels/lora_grad_tiles.h"

namespace r2f {
namespace {

using simd::VectorOf;
using namespace tiles;

// One of the two sides, x and delta: [0] the rows themselves, [1] how they move.
template <typename T, int Bytes>
struct Side {
  using Acc = Accumulation<T>;
  const T* rows[2];  // null: 0
  int64_t features, whole;
  Rows<T> room[2];  // for rows that do not end at a whole vector, else null
  Acc* weights;     // packed
  Panels<Acc, Bytes> factors[2];
  Rows<Acc> partial;
  Acc* grad;

  // Rows t <= row < t + count of block `p` of `tokens` rows.
  R2F_INLINE Rows<const T> read(int i, int64_t p, int64_t tokens, int64_t t, int64_t count) const {
    return padded_rows<T>(rows[i] + (p * tokens + t) * features, features, count, 0, whole, room[i]);
  }
};

template <typename T, int Bytes>
R2F_INLINE void run(const LoraGradTangentArgs& args, int64_t first, int64_t last) {
  using Acc = Accumulation<T>;
  using S = Scratch<Acc>;
  const int64_t P = args.groups, K = args.directions, tokens = args.tokens, rank = args.rank;
  const int64_t run_rows = std::clamp<int64_t>(tokens, 1, kMaxRows), padded = Block<Bytes>::padded(rank);
  const int sides = args.B == nullptr ? 1 : 2;

  Side<T, Bytes> side[2] = {};
  side[0].rows[0] = static_cast<const T*>(args.x), side[0].rows[1] = static_cast<const T*>(args.dx);
  side[1].rows[0] = static_cast<const T*>(args.delta), side[1].rows[1] = static_cast<const T*>(args.ddelta);
  side[0].features = args.d_in, side[1].features = args.d_out;
  side[0].grad = static_cast<Acc*>(args.grad_A), side[1].grad = static_cast<Acc*>(args.grad_B);
  int64_t size = 0;
  for (Side<T, Bytes>& s : side) {
    s.whole = whole_vectors<Acc, Bytes>(s.features);
    size += S::size(padded + 2 * run_rows, s.whole) + padded * s.whole + 16;
    size += Panels<Acc, Bytes>::size(tokens, rank) + Panels<Acc, Bytes>::size(run_rows, rank) + 32;
  }
  S scratch(size);
  for (Side<T, Bytes>& s : side) {
    s.weights = scratch.take(padded * s.whole);
    s.partial = scratch.take(padded, s.whole);
    s.factors[0] = {scratch.take(Panels<Acc, Bytes>::size(tokens, rank)), tokens};
    s.factors[1] = {scratch.take(Panels<Acc, Bytes>::size(run_rows, rank)), run_rows};
    if (s.whole == s.features) continue;
    for (Rows<T>& room : s.room)
      room = {reinterpret_cast<T*>(scratch.take(run_rows, s.whole).data), S::stride(s.whole)};
  }

  for (int64_t item = first; item < last; ++item) {
    const int64_t p = item / K, k = item % K, kp = k * P + p;
    const bool new_group = item == first || k == 0;
    if (item == first || (new_group && args.A_per_group))
      pack<T, Bytes>(static_cast<const T*>(args.A) + (args.A_per_group ? p * rank * args.d_in : 0), args.d_in, 1, rank,
                     args.d_in, side[0].weights);
    if (sides == 2 && (item == first || (new_group && args.B_per_group)))
      pack<T, Bytes>(static_cast<const T*>(args.B) + (args.B_per_group ? p * args.d_out * rank : 0), 1, rank, rank,
                     args.d_out, side[1].weights);

    int64_t t = 0;
    do {  // at least once: without rows the sums are zero
      const int64_t count = std::min(run_rows, tokens - t);
      Rows<const T> rows[2][2] = {};
      for (int i = 0; i < 2; ++i)
        for (int moves = 0; moves < 2; ++moves)
          if (side[i].rows[moves] != nullptr) rows[i][moves] = side[i].read(moves, moves ? kp : p, tokens, t, count);

      for (int i = 0; i < sides; ++i) {
        for (int moves = 0; moves < 2; ++moves) {
          // A group's own factors meet what moves on the other side.
          if (moves == 1 ? side[i].rows[1] == nullptr : !new_group || side[1 - i].rows[1] == nullptr) continue;
          project<T, Bytes>(rows[i][moves], side[i].weights, count, side[i].whole, rank, side[i].factors[moves],
                            moves ? 0 : t);
        }
      }
      for (int i = 0; i < sides; ++i) {
        const Side<T, Bytes>& s = side[1 - i];
        Term<T, Bytes> terms[2];
        int terms_count = 0;
        if (s.rows[1] != nullptr) terms[terms_count++] = {rows[1 - i][1], side[i].factors[0].from(t)};
        if (side[i].rows[1] != nullptr) terms[terms_count++] = {rows[1 - i][0], side[i].factors[1]};
        accumulate<T, Bytes>(terms, terms_count, count, 0, s.whole,
                             {s.grad + kp * rank * s.features, rank, s.features, i == 0, static_cast<Acc>(args.scale),
                              s.partial, t == 0, t + count >= tokens});
      }
      t += run_rows;
    } while (t < tokens);
  }
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const LoraGradTangentArgs& args, int64_t first, int64_t last) {
  switch (dtype) {
    case DType::kFloat32: return run<float, Bytes>(args, first, last);
    case DType::kFloat64: return run<double, Bytes>(args, first, last);
    case DType::kBFloat16: return run<BFloat16, Bytes>(args, first, last);
  }
}

#ifdef R2F_X86_DISPATCH
R2F_TARGET_AVX512 void run_avx512(DType dtype, const LoraGradTangentArgs& args, int64_t first, int64_t last) {
  run_dtype<64>(dtype, args, first, last);
}
R2F_TARGET_AVX2 void run_avx2(DType dtype, const LoraGradTangentArgs& args, int64_t first, int64_t last) {
  run_dtype<32>(dtype, args, first, last);
}
#endif
void run_baseline(DType dtype, const LoraGradTangentArgs& args, int64_t first, int64_t last) {
  run_dtype<16>(dtype, args, first, last);
}

}  // namespace

void lora_grad_tangent_cpu(DType dtype, const LoraGradTangentArgs& args, int64_t first, int64_t last) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, args, first, last);
    case simd::Isa::kAvx2: return run_avx2(dtype, args, first, last);
#endif
    default: return run_baseline(dtype, args, first, last);
  }
}

}  // namespace r2f
