// LoRA-factor gradients of all layers of a model in two launches. See lora_grad.h for the formulas.
//
//   project:     U = x A^T. A warp processes a few tokens of one layer; its lanes divide the features.
//   accumulate:  grad_B = scale delta^T U, or += this. A warp processes a stripe of columns of one group of one layer.
//
// The kernels are memory-bound, so each lane keeps several 16-byte loads in flight. x and delta are read once, by loads
// that do not allocate L1 lines, so that A and U stay in L1. The table of layers is a kernel parameter (constant
// memory). float32 products run on the FMA units, bfloat16 products on tensor cores, where U is stored as the sum of
// two bfloat16 numbers (16 significant bits instead of 8). Sums have a fixed order: results are deterministic.
#include "kernels/lora_grad.h"
#include "kernels/lora_grad_bfloat16.h"
#include "kernels/lora_grad_float.h"

namespace r2f {
namespace {

// With fewer items than this, one warp per item does not saturate the memory bandwidth of a large GPU (seen on an H100,
// no record). Then kSplit warps share an item; a kernel that does not split items gives each item a block of its own,
// so that all multiprocessors have work.
constexpr int64_t kFewItems = 2048;

unsigned blocks_of(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

template <int R>
void launch_float(const Table& table, cudaStream_t stream) {
  constexpr int kSplit = R == 16 ? 4 : 8;
  const int warps = table.projects < kFewItems ? 1 : kProjectWarps;
  if (table.projects > 0)
    launch(project_float<R>, blocks_of(table.projects, warps), warps * kWarpSize, 0, stream, table);
  if (table.accumulates == 0) return;
  const auto blocks = static_cast<unsigned>(table.accumulates);
  if (table.accumulates < kFewItems)
    launch(accumulate_float<R, kSplit>, blocks, kSplit * kWarpSize, sizeof(Parts<R, kSplit>), stream, table);
  else
    launch(accumulate_float<R, 1>, blocks, kWarpSize, 0, stream, table);
}

template <int kRankTiles>
void launch_bfloat16(const Table& table, cudaStream_t stream) {
  constexpr int kSplit = kProjectWarps, kThreads = kSplit * kWarpSize;
  if (table.projects >= kFewItems)
    launch(project_bfloat16<kRankTiles, 1>, blocks_of(table.projects, kProjectWarps), kThreads, 0, stream, table);
  else if (table.projects > 0)
    launch(project_bfloat16<kRankTiles, kSplit>, blocks_of(table.projects, 1), kThreads,
           sizeof(WarpParts<kRankTiles * 4, kSplit>), stream, table);
  if (table.accumulates >= kFewItems)
    launch(accumulate_bfloat16<kRankTiles, 1>, blocks_of(table.accumulates, 1), kWarpSize, 0, stream, table);
  else if (table.accumulates > 0)
    launch(accumulate_bfloat16<kRankTiles, kSplit>, blocks_of(table.accumulates, 1), kThreads,
           sizeof(WarpParts<kRankTiles * 16, kSplit>), stream, table);
}

// The kernel instantiation for the largest rank of all layers, and the sizes of its items.
struct Plan {
  int ranks, project_tokens, columns;
  void (*launch)(const Table&, cudaStream_t);
};

Plan plan_of(DType dtype, const LoraGradLayer* layers, int64_t count) {
  int64_t rank = 1;
  for (int64_t l = 0; l < count; ++l) rank = layers[l].rank > rank ? layers[l].rank : rank;
  if (dtype == DType::kBFloat16) {
    if (rank <= 8) return {8, kTileTokens, kHalfColumns, launch_bfloat16<1>};
    if (rank <= 16) return {16, kTileTokens, kHalfColumns, launch_bfloat16<2>};
    return {32, kTileTokens, kHalfColumns, launch_bfloat16<4>};
  }
  if (rank <= 4) return {4, kTokensOf<4>, kFloatColumns, launch_float<4>};
  if (rank <= 8) return {8, kTokensOf<8>, kFloatColumns, launch_float<8>};
  return {16, kTokensOf<16>, kFloatColumns, launch_float<16>};
}

// Size of one layer's U, in floats.
int64_t workspace_of(DType dtype, const LoraGradLayer& layer, const Plan& plan) {
  if (dtype == DType::kFloat32) return layer.x_groups * layer.tokens * plan.ranks;
  return layer.x_groups * ((layer.tokens + kTileTokens - 1) / kTileTokens) * kTileTokens * plan.ranks;
}

Layer layer_from(DType dtype, const LoraGradLayer& from, float* U, const Plan& plan, Table& table) {
  const bool one_A = from.A_groups == 1 && dtype == DType::kFloat32;
  Layer to{};
  to.x = from.x, to.delta = from.delta, to.A = from.A, to.U = U, to.grad_B = from.grad_B;
  to.tokens = from.tokens, to.d_in = from.d_in, to.d_out = from.d_out;
  to.project_tokens = one_A ? from.x_groups * from.tokens : from.tokens;
  to.x_groups = from.x_groups, to.delta_groups = from.delta_groups, to.A_groups = from.A_groups;
  to.scale = static_cast<float>(from.scale), to.rank = static_cast<int>(from.rank), to.adds = from.adds;
  to.first_project = table.projects, to.first_accumulate = table.accumulates;
  table.projects += (one_A ? 1 : from.x_groups) * ((to.project_tokens + plan.project_tokens - 1) / plan.project_tokens);
  table.accumulates += from.groups * ((from.d_out + plan.columns - 1) / plan.columns);
  return to;
}

}  // namespace

bool lora_grad_cuda_takes(DType dtype, const LoraGradLayer& layer) {
  if (dtype == DType::kFloat64 || layer.rank > (dtype == DType::kFloat32 ? 16 : 32)) return false;
  const int64_t vector = dtype == DType::kFloat32 ? 4 : 8;
  const auto addresses = reinterpret_cast<uintptr_t>(layer.x) | reinterpret_cast<uintptr_t>(layer.delta) |
                         reinterpret_cast<uintptr_t>(layer.A);
  return layer.d_in % vector == 0 && layer.d_out % vector == 0 && addresses % 16 == 0;
}

int64_t lora_grad_cuda_workspace(DType dtype, const LoraGradLayer* layers, int64_t count) {
  const Plan plan = plan_of(dtype, layers, count);
  int64_t size = 0;
  for (int64_t l = 0; l < count; ++l) size += workspace_of(dtype, layers[l], plan);
  return size;
}

const char* lora_grad_cuda(DType dtype, const LoraGradLayer* layers, int64_t count, float* workspace, void* stream) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  const Plan plan = plan_of(dtype, layers, count);
  for (int64_t first = 0; first < count; first += kMaxLayers) {
    Table table{};
    table.count = static_cast<int>(count - first < kMaxLayers ? count - first : kMaxLayers);
    for (int l = 0; l < table.count; ++l) {
      table.layers[l] = layer_from(dtype, layers[first + l], workspace, plan, table);
      workspace += workspace_of(dtype, layers[first + l], plan);
    }
    if (table.projects > kMaxBlocks || table.accumulates > kMaxBlocks) return "too many groups for one launch";
    plan.launch(table, static_cast<cudaStream_t>(stream));
  }
  return launch_error();
}

}  // namespace r2f
