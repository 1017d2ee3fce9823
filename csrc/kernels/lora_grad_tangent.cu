// Tangents of LoRA-factor gradients on CUDA. See lora_grad_tangent.h for what is computed.
//
// As for the gradients themselves (lora_grad.cu), two kernels:
//
//   project:     the factors of every group, and of every direction. One warp takes a few rows.
//
//   accumulate:  both terms of a sum at once. One block takes a group, a direction and a stripe of columns.
//
// What moves is read once without B, twice with it; a group's own rows are read again for every direction, from L2.
#include "kernels/lora_grad_device.h"
#include "kernels/lora_grad_tangent.h"

namespace r2f {
namespace {

using namespace tiles;  // add_rows has the barrier that R2F_PLANTED_BUG leaves out

// Blocks of `tokens` rows each, direction by direction: block i belongs to group i % groups.
struct Shape {
  int64_t groups, blocks, tokens, features, rank;
  bool aligned;  // every row starts at a whole pack and is made of whole packs
};

// u [blocks, tokens, rank] = x w^T. w is [rank, features], or [features, rank] if kByFeature; w_stride between groups
// (0: one for all).
template <typename T, bool kByFeature>
__global__ void __launch_bounds__(kThreads)
    project(const T* x, const T* w, int64_t w_stride, Accumulation<T>* u, Shape shape) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t per_block = (shape.tokens + kProjectTokens - 1) / kProjectTokens;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp; item < shape.blocks * per_block; item += step) {
    const int64_t block = item / per_block, first = item % per_block * kProjectTokens;
    const int64_t row = block * shape.tokens + first;
    project_rows<T, kByFeature>(x + row * shape.features, shape.tokens - first, w + block % shape.groups * w_stride,
                                u + row * shape.rank, shape.features, shape.rank, shape.aligned);
  }
}

// One term of a sum: rows and their factors, by group or by direction and group. No rows: nothing.
template <typename T>
struct Term {
  const T* x;
  const Accumulation<T>* u;
};

// grad = scale (moving.u^T moving.x + still.u^T still.x) for kRanks ranks (block index y) and one stripe of columns at
// a time. In the first term x is of a direction and u of the group alone; in the second it is the other way round.
template <typename T, int kRanks, bool kByFeature>
__global__ void __launch_bounds__(kThreads)
    accumulate(Term<T> moving, Term<T> still, Accumulation<T>* grad, Accumulation<T> scale, Shape shape) {
  using Acc = Accumulation<T>;
  using Shared = AccumulateShared<T, kRanks>;
  constexpr int kVec = kPack<T>, kColumns = Shared::kColumns;
  R2F_DYNAMIC_SHARED(Shared, shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int64_t j0 = static_cast<int64_t>(blockIdx.y) * kRanks;
  const int64_t stripes = (shape.features + kColumns - 1) / kColumns;

  for (int64_t item = blockIdx.x; item < shape.blocks * stripes; item += gridDim.x) {
    const int64_t block = item / stripes, first_column = item % stripes * kColumns;
    Acc sum[kRanks][kVec] = {};
#pragma unroll 1
    for (int term = 0; term < 2; ++term) {
      const T* x = term == 0 ? moving.x : still.x;
      const Acc* u = term == 0 ? moving.u : still.u;
      if (x == nullptr) continue;
      const int64_t group = block % shape.groups, column = first_column + lane * kVec;
      x += (term == 0 ? block : group) * shape.tokens * shape.features + column;
      u += (term == 0 ? group : block) * shape.tokens * shape.rank + j0;
      add_rows<T, kRanks>(x, shape.features, shape.features - column, shape.aligned, u, shape.rank, shape.rank - j0,
                          shape.tokens, shared, sum);
    }
    add_up_warps<T, kRanks>(sum, shared);

    // Write in the order of the output, so that neighbouring threads write neighbouring places.
    for (int i = thread; i < kColumns * kRanks; i += kThreads) {
      const int c = kByFeature ? i / kRanks : i % kColumns, j = kByFeature ? i % kRanks : i / kColumns;
      if (first_column + c >= shape.features || j0 + j >= shape.rank) continue;
      const int64_t place =
          kByFeature ? (first_column + c) * shape.rank + j0 + j : (j0 + j) * shape.features + first_column + c;
      grad[block * shape.rank * shape.features + place] = scale * shared.total[j][c];
    }
  }
}

template <typename T, bool kByFeature>
void launch_project(const T* x, const T* w, int64_t w_stride, Accumulation<T>* u, Shape shape, cudaStream_t stream) {
  const int64_t items = shape.blocks * ((shape.tokens + kProjectTokens - 1) / kProjectTokens);
  if (items == 0) return;
  launch(project<T, kByFeature>, grid_for((items + kWarps - 1) / kWarps), kThreads, 0, stream, x, w, w_stride, u,
         shape);
}

template <typename T, int kRanks, bool kByFeature>
void launch_accumulate(Term<T> moving, Term<T> still, void* grad, double scale, Shape shape, cudaStream_t stream) {
  using Acc = Accumulation<T>;
  using Shared = AccumulateShared<T, kRanks>;
  const int64_t items = shape.blocks * ((shape.features + Shared::kColumns - 1) / Shared::kColumns);
  if (items == 0) return;
  const dim3 grid(grid_for(items), static_cast<unsigned>((shape.rank + kRanks - 1) / kRanks));
  launch(accumulate<T, kRanks, kByFeature>, grid, kThreads, sizeof(Shared), stream, moving, still,
         static_cast<Acc*>(grad), static_cast<Acc>(scale), shape);
}

template <typename T, bool kByFeature>
void launch_accumulate(Term<T> moving, Term<T> still, void* grad, double scale, Shape shape, cudaStream_t stream) {
  if (shape.rank <= 8) return launch_accumulate<T, 8, kByFeature>(moving, still, grad, scale, shape, stream);
  return launch_accumulate<T, 16, kByFeature>(moving, still, grad, scale, shape, stream);
}

// The factors of one side: of its rows if the other side moves, and of how they move themselves.
template <typename T, bool kByFeature>
void launch_factors(const T* rows, const T* moves, bool other_moves, const T* w, int64_t w_stride, Accumulation<T>* u,
                    Accumulation<T>* du, Shape shape, cudaStream_t stream) {
  Shape still = shape;
  still.blocks = shape.groups;
  if (other_moves) launch_project<T, kByFeature>(rows, w, w_stride, u, still, stream);
  if (moves != nullptr) launch_project<T, kByFeature>(moves, w, w_stride, du, shape, stream);
}

template <typename T>
void run(const LoraGradTangentArgs& args, void* workspace, cudaStream_t stream) {
  using Acc = Accumulation<T>;
  const T *x = static_cast<const T*>(args.x), *dx = static_cast<const T*>(args.dx);
  const T *delta = static_cast<const T*>(args.delta), *ddelta = static_cast<const T*>(args.ddelta);
  const T *A = static_cast<const T*>(args.A), *B = static_cast<const T*>(args.B);
  const int64_t A_stride = args.A_per_group ? args.rank * args.d_in : 0;
  const int64_t B_stride = args.B_per_group ? args.d_out * args.rank : 0;
  const int64_t blocks = args.groups * args.directions, factors = args.groups * args.tokens * args.rank;
  Shape in{args.groups, blocks, args.tokens, args.d_in, args.rank, false};
  Shape out{args.groups, blocks, args.tokens, args.d_out, args.rank, false};
  in.aligned = aligned<T>(x, A, args.d_in) && aligned<T>(dx, nullptr, args.d_in);
  out.aligned = aligned<T>(delta, ddelta, args.d_out);

  Acc *u = static_cast<Acc*>(workspace), *du = u + factors;
  launch_factors<T, false>(x, dx, ddelta != nullptr, A, A_stride, u, du, in, stream);
  launch_accumulate<T, true>({ddelta, u}, {dx == nullptr ? nullptr : delta, du}, args.grad_B, args.scale, out, stream);
  if (B == nullptr) return;
  Acc *v = du + args.directions * factors, *dv = v + factors;
  launch_factors<T, true>(delta, ddelta, dx != nullptr, B, B_stride, v, dv, out, stream);
  launch_accumulate<T, false>({dx, v}, {ddelta == nullptr ? nullptr : x, dv}, args.grad_A, args.scale, in, stream);
}

}  // namespace

const char* lora_grad_tangent_cuda(DType dtype, const LoraGradTangentArgs& args, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: run<float>(args, workspace, cuda_stream); break;
    case DType::kFloat64: run<double>(args, workspace, cuda_stream); break;
    case DType::kBFloat16: run<BFloat16>(args, workspace, cuda_stream); break;
  }
  return launch_error();
}

}  // namespace r2f
