// LoRA-factor gradients on the CPU. See lora_grad.h for what is computed, lora_grad_tiles.h for how.
//
// There are two sides: U = x A^T and V = delta B are the same product, as are grad_B = delta^T U and grad_A = V^T x.
#include "kernels/lora_grad.h"

#include "kernels/lora_grad_tiles.h"

namespace r2f {
namespace {

using simd::VectorOf;
using namespace tiles;

// Bytes of x and delta that are read twice while they are in the second-level cache.
constexpr int64_t kTwiceReadBytes = 1 << 20;
// A group of more bytes of x and delta is streamed: with few ranks it is taken in runs of so many bytes and rows, which
// the hardware foresees, unlike columns of many long rows. With many ranks arithmetic takes longer than memory.
constexpr int64_t kStreamedBytes = 192 << 10, kStreamedRunBytes = 384 << 10, kStreamedRows = 48, kStreamedRanks = 15;
// Columns in an item of the sums.
constexpr int64_t kItemColumns = 192;

// What one thread does: groups first <= p < last; of their rows, those within [first_row, last_row); of the columns of
// grad_B, then grad_A, those within [first_column, last_column).
struct Part {
  int64_t first, last;
  bool factors = true, sums = true;
  void* workspace = nullptr;  // factors of all rows; null: none are kept
  int64_t first_row = 0, last_row = INT64_MAX;
  int64_t first_column = 0, last_column = INT64_MAX;
};

// Groups of which the sums take one column after another: d_out, and d_in with B.
int64_t items_of(int64_t features) { return (features + kItemColumns - 1) / kItemColumns; }
int64_t items_per_group(const LoraGradArgs& args) {
  return items_of(args.d_out) + (args.B == nullptr ? 0 : items_of(args.d_in));
}

// One of the two sides: its rows, their factors, and the sums that the factors make with the other side's rows.
template <typename T, int Bytes>
struct Side {
  using Acc = Accumulation<T>;
  const T* rows;
  int64_t features, whole;  // whole: padded to whole vectors
  Rows<T> room;             // for rows that do not end at a whole vector, else null
  Acc* weights;             // packed
  Panels<Acc, Bytes> factors;
  Rows<Acc> partial;
  Acc *grad, *stepped;
  bool by_feature;

  // Rows t <= row < t + count, columns first <= i < last, in place or as a copy padded with zeros.
  R2F_INLINE Rows<const T> read(int64_t t, int64_t count, int64_t first, int64_t last) const {
    return padded_rows<T>(rows + t * features, features, count, first, last, room);
  }

  // stepped = factor - lr * grad for columns first <= i < last of group p.
  R2F_INLINE void step(const T* factor, Acc lr, int64_t rank, int64_t first, int64_t last, int64_t p) const {
    if (stepped == nullptr) return;
    const int64_t begin = by_feature ? first * rank : first, length = (last - first) * (by_feature ? rank : 1);
    const int64_t stride = features, count = by_feature ? 1 : rank, group = p * rank * features;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t from = begin + j * stride;
      for (int64_t k = from; k < from + length; ++k)
        stepped[group + k] = (factor == nullptr ? Acc(0) : Acc(widen(factor[k]))) - lr * grad[group + k];
    }
  }
};

template <typename T, int Bytes>
R2F_INLINE void run(const LoraGradArgs& args, const Part& part) {
  using Acc = Accumulation<T>;
  using S = Scratch<Acc>;
  const bool with_B = args.B != nullptr;
  const int sides = with_B ? 2 : 1;
  const int64_t rank = args.rank, padded = Block<Bytes>::padded(rank);
  int64_t most_rows = 1;
  for (int64_t p = part.first; p < part.last; ++p)
    most_rows = std::max(most_rows, args.first_row(p + 1) - args.first_row(p));

  Side<T, Bytes> side[2] = {};
  side[0].rows = static_cast<const T*>(args.x), side[0].features = args.d_in;
  side[1].rows = static_cast<const T*>(args.delta), side[1].features = args.d_out;
  side[0].grad = static_cast<Acc*>(args.grad_A), side[0].stepped = static_cast<Acc*>(args.A1);
  side[1].grad = static_cast<Acc*>(args.grad_B), side[1].stepped = static_cast<Acc*>(args.B1);
  side[1].by_feature = true;
  bool copies = false;
  for (Side<T, Bytes>& s : side) s.whole = whole_vectors<Acc, Bytes>(s.features), copies |= s.whole != s.features;

  int64_t run_rows = std::min(most_rows, kMaxRows);
  const int64_t row_bytes = (args.d_in + args.d_out) * static_cast<int64_t>(sizeof(T));
  if (rank <= kStreamedRanks && most_rows * row_bytes > kStreamedBytes) {
    run_rows = std::min(run_rows, std::clamp<int64_t>(kStreamedRunBytes / row_bytes / 12 * 12, 12, kStreamedRows));
  } else if (with_B || copies) {
    run_rows = std::min(run_rows, std::max<int64_t>(24, kTwiceReadBytes / (row_bytes + 1) / 24 * 24));
  }
  const int64_t factor_rows = part.workspace == nullptr ? run_rows : args.rows;
  const int64_t factor_size = Panels<Acc, Bytes>::size(factor_rows, rank);

  const auto size_of = [&](const Side<T, Bytes>& s, bool weights) {
    return (s.whole != s.features ? S::size(run_rows, s.whole) : 0) + (weights ? padded * s.whole + 16 : 0) +
           (most_rows > run_rows ? S::size(padded, s.whole) : 0) + (part.workspace == nullptr ? factor_size + 16 : 0);
  };
  S scratch(size_of(side[0], part.factors) + size_of(side[1], part.factors && with_B));
  for (int i = 0; i < 2; ++i) {
    Side<T, Bytes>& s = side[i];
    if (s.whole != s.features)
      s.room = {reinterpret_cast<T*>(scratch.take(run_rows, s.whole).data), S::stride(s.whole)};
    if (part.factors && i < sides) s.weights = scratch.take(padded * s.whole);
    if (most_rows > run_rows) s.partial = scratch.take(padded, s.whole);
    if (i < sides) {
      Acc* own =
          part.workspace != nullptr ? static_cast<Acc*>(part.workspace) + i * factor_size : scratch.take(factor_size);
      s.factors = {own, factor_rows};
    }
  }

  for (int64_t p = part.first; p < part.last; ++p) {
    const T* A = static_cast<const T*>(args.A) + (args.A_per_group ? p * rank * args.d_in : 0);
    const T* B = with_B ? static_cast<const T*>(args.B) + (args.B_per_group ? p * args.d_out * rank : 0) : nullptr;
    if (part.factors && (p == part.first || args.A_per_group))
      pack<T, Bytes>(A, args.d_in, 1, rank, args.d_in, side[0].weights);
    if (part.factors && with_B && (p == part.first || args.B_per_group))
      pack<T, Bytes>(B, 1, rank, rank, args.d_out, side[1].weights);

    const int64_t begin = std::max(args.first_row(p), part.first_row),
                  end = std::min(args.first_row(p + 1), part.last_row);
    int64_t t = begin;
    do {  // at least once: a group without rows has sums too, zero
      const int64_t count = std::max<int64_t>(0, std::min(run_rows, end - t));
      const int64_t place = part.workspace == nullptr ? 0 : t;
      if (part.factors) {
        for (int i = 0; i < sides; ++i) {
          const Side<T, Bytes>& s = side[i];
          project<T, Bytes>(s.read(t, count, 0, s.whole), s.weights, count, s.whole, rank, s.factors, place);
        }
      }
      if (part.sums) {
        int64_t before = 0;  // columns of the other side
        for (int i = 0; i < sides; ++i) {
          const Side<T, Bytes>& s = side[1 - i];
          const int64_t first = std::clamp<int64_t>(part.first_column - before, 0, s.whole);
          const int64_t last = std::clamp<int64_t>(part.last_column - before, 0, s.whole);
          before += items_of(s.features) * kItemColumns;
          if (first == last) continue;
          const bool copied = part.factors && 1 - i < sides && s.room.data != nullptr;  // when it was projected
          const Term<T, Bytes> term{copied ? Rows<const T>(s.room) : s.read(t, count, first, last),
                                    side[i].factors.from(place)};
          accumulate<T, Bytes>(&term, 1, count, first, last,
                               {s.grad + p * rank * s.features, rank, s.features, s.by_feature,
                                static_cast<Acc>(args.scale), s.partial, t == begin, t + count >= end});
          if (t + count >= end)
            s.step(s.by_feature ? B : A, static_cast<Acc>(args.lr), rank, first, std::min(last, s.features), p);
        }
      }
      t += run_rows;
    } while (t < end);
  }
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const LoraGradArgs& args, const Part& part) {
  switch (dtype) {
    case DType::kFloat32: return run<float, Bytes>(args, part);
    case DType::kFloat64: return run<double, Bytes>(args, part);
    case DType::kBFloat16: return run<BFloat16, Bytes>(args, part);
  }
}

#ifdef R2F_X86_DISPATCH
R2F_TARGET_AVX512 void run_avx512(DType dtype, const LoraGradArgs& args, const Part& part) {
  run_dtype<64>(dtype, args, part);
}
R2F_TARGET_AVX2 void run_avx2(DType dtype, const LoraGradArgs& args, const Part& part) {
  run_dtype<32>(dtype, args, part);
}
#endif
void run_baseline(DType dtype, const LoraGradArgs& args, const Part& part) { run_dtype<16>(dtype, args, part); }

void run_part(DType dtype, const LoraGradArgs& args, const Part& part) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, args, part);
    case simd::Isa::kAvx2: return run_avx2(dtype, args, part);
#endif
    default: return run_baseline(dtype, args, part);
  }
}

}  // namespace

void lora_grad_cpu(DType dtype, const LoraGradArgs& args, int64_t first, int64_t last) {
  run_part(dtype, args, {first, last});
}

void lora_grad_cpu_factors(DType dtype, const LoraGradArgs& args, void* workspace, int64_t first_row,
                           int64_t last_row) {
  Part part{};
  part.first = std::max<int64_t>(args.first_group_from(first_row + 1) - 1, 0);
  part.last = args.first_group_from(last_row);
  part.sums = false, part.workspace = workspace, part.first_row = first_row, part.last_row = last_row;
  run_part(dtype, args, part);
}

int64_t lora_grad_cpu_items(const LoraGradArgs& args) { return args.groups * items_per_group(args); }

void lora_grad_cpu_sums(DType dtype, const LoraGradArgs& args, const void* workspace, int64_t first_item,
                        int64_t last_item) {
  const int64_t per_group = items_per_group(args);
  for (int64_t item = first_item; item < last_item; ++item) {
    Part part{item / per_group, item / per_group + 1};
    part.factors = false, part.workspace = const_cast<void*>(workspace);
    part.first_column = item % per_group * kItemColumns, part.last_column = part.first_column + kItemColumns;
    run_part(dtype, args, part);
  }
}

}  // namespace r2f
