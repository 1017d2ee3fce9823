// Decoders of many layers on CUDA. See decode.h for what is computed: each weight is read once for the whole batch, by
// 128-bit loads.
//
//   map_rows      one warp takes some rows of one map
//   head_columns  one thread takes a few columns of one basis; the coefficients wait in shared memory
//   input_norms   one warp takes a sample of one layer
//
// Layers are described by value, in tables that fit a kernel's parameters: one launch a stage, or one for 32 layers.
// Each sum is taken in one fixed order: results are deterministic.
#include "kernels/decode.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kTable = 32;       // layers of one launch
constexpr int kMostSamples = 8;  // that are summed at once
constexpr int kMapRows = 2;      // rows that a warp sums at once
constexpr int kRankChunk = 256;  // coefficients of each sample in shared memory

template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <typename Part>
struct Entry {
  Part part;
  int64_t first;  // item, counted from the table's first
  bool aligned;
};

template <typename Part>
struct Table {
  Entry<Part> entries[kTable];
  int count;
  int64_t items;
  // The part that an item belongs to.
  R2F_HOST_DEVICE int find(int64_t item) const {
    int part = 0;
    while (part + 1 < count && entries[part + 1].first <= item) ++part;
    return part;
  }
};
static_assert(sizeof(Table<DecodeMap>) <= 3900);

template <typename Acc>
__device__ __forceinline__ Acc activate(Activation activation, Acc v) {
  if (activation == Activation::kGelu) return v * Acc(0.5) * (1 + erf(v * Acc(0.70710678118654752440)));
  if (activation == Activation::kRelu) return v > 0 || v != v ? v : Acc(0);  // NaN stays
  return v;
}

// Bias, norms and activation of one sum.
template <typename T>
__device__ __forceinline__ void finish(const DecodeMap& map, Activation activation, int64_t row, int64_t sample,
                                       Accumulation<T> sum) {
  using Acc = Accumulation<T>;
  if (map.divisor != nullptr) {
    const Acc norm = static_cast<const Acc*>(map.divisor)[sample];
    sum *= norm == 0 ? Acc(0) : 1 / norm;
  }
  if (map.bias != nullptr) sum += widen(static_cast<const T*>(map.bias)[row]);
  const int64_t at = sample * map.rows + row;
  if (map.before != nullptr) static_cast<Acc*>(map.before)[at] = sum;
  const Acc factor = map.factor == nullptr ? Acc(1) : static_cast<const Acc*>(map.factor)[sample];
  static_cast<Acc*>(map.out)[at] = activate(activation, sum) * factor;
}

// Samples `start` to start + samples - 1 of the stage's batch; an item is kMapRows rows.
template <typename T, int Samples>
__global__ void __launch_bounds__(kThreads)
    map_rows(Table<DecodeMap> table, int64_t start, int samples, Activation activation) {
  using Acc = Accumulation<T>;
  constexpr int kVec = kPack<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp; item < table.items; item += step) {
    const Entry<DecodeMap>& entry = table.entries[table.find(item)];
    const DecodeMap& map = entry.part;
    const int64_t row = (item - entry.first) * kMapRows;
    Acc sum[kMapRows][Samples] = {};
    for (int64_t k = static_cast<int64_t>(lane) * kVec; k < map.columns; k += kWarpSize * kVec) {
      const bool whole = entry.aligned && k + kVec <= map.columns;
      Pack<T, kVec> w[kMapRows];
#pragma unroll
      for (int r = 0; r < kMapRows; ++r) {
        const int64_t from = row + r < map.rows ? row + r : map.rows - 1;
        w[r] = load_pack<T, kVec>(static_cast<const T*>(map.weight) + from * map.columns + k, map.columns - k, whole);
      }
#pragma unroll
      for (int s = 0; s < Samples; ++s) {
        const int64_t sample = start + (s < samples ? s : samples - 1);  // those too many are summed and dropped
        const Acc* in = static_cast<const Acc*>(map.in) + sample * map.columns + k;
#pragma unroll
        for (int part = 0; part < kVec; part += kPack<Acc>) {
          const auto h = load_pack<Acc, kPack<Acc>>(in + part, map.columns - k - part, whole);
#pragma unroll
          for (int e = 0; e < kPack<Acc>; ++e) {
#pragma unroll
            for (int r = 0; r < kMapRows; ++r) sum[r][s] += widen(w[r].element[part + e]) * h.element[e];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kMapRows; ++r) {
#pragma unroll
      for (int s = 0; s < Samples; ++s) {
        const Acc total = warp_sum(sum[r][s]);
        if (lane == 0 && row + r < map.rows && s < samples) finish<T>(map, activation, row + r, start + s, total);
      }
    }
  }
}

template <typename Acc>
struct Coefficients {
  Acc of[kRankChunk][kMostSamples];
};

// An item is a block's columns of one basis.
template <typename T, int Samples>
__global__ void __launch_bounds__(kThreads) head_columns(Table<DecodeHead> table, int64_t start, int samples) {
  using Acc = Accumulation<T>;
  constexpr int kVec = kPack<T>;
  R2F_DYNAMIC_SHARED(Coefficients<Acc>, shared);
  for (int64_t item = blockIdx.x; item < table.items; item += gridDim.x) {
    const Entry<DecodeHead>& entry = table.entries[table.find(item)];
    const DecodeHead& head = entry.part;
    const int64_t column = ((item - entry.first) * kThreads + threadIdx.x) * kVec;
    const bool whole = entry.aligned && column + kVec <= head.size;
    Acc sum[Samples][kVec] = {};
    for (int64_t chunk = 0; chunk < head.rank; chunk += kRankChunk) {
      const int ranks = static_cast<int>(head.rank - chunk < kRankChunk ? head.rank - chunk : kRankChunk);
      __syncthreads();  // all have read the block's last coefficients
      for (int i = static_cast<int>(threadIdx.x); i < ranks * Samples; i += kThreads) {
        const int s = i / ranks, r = i % ranks;
        const Acc* from = static_cast<const Acc*>(head.coefficients) + (start + s) * head.rank + chunk;
        shared.of[r][s] = s < samples ? from[r] : Acc(0);
      }
#ifndef R2F_PLANTED_BUG  // the tests leave this barrier out and must notice
      __syncthreads();
#endif
      if (column >= head.size) continue;
      const T* basis = static_cast<const T*>(head.basis) + chunk * head.stride + column;
#pragma unroll 4
      for (int r = 0; r < ranks; ++r) {
        const auto row = load_pack<T, kVec>(basis + r * head.stride, head.size - column, whole);
#pragma unroll
        for (int s = 0; s < Samples; ++s) {
          const Acc c = shared.of[r][s];
#pragma unroll
          for (int e = 0; e < kVec; ++e) sum[s][e] += widen(row.element[e]) * c;
        }
      }
    }
    constexpr int kStore = kPack<Acc>;
#pragma unroll
    for (int s = 0; s < Samples; ++s) {
      if (s >= samples) break;
#pragma unroll
      for (int part = 0; part < kVec; part += kStore) {
        const int64_t left = head.size - column - part;
        if (left <= 0) continue;
        Pack<Acc, kStore> result;
#pragma unroll
        for (int e = 0; e < kStore; ++e) result.element[e] = sum[s][part + e];
        store_pack(static_cast<Acc*>(head.out) + (start + s) * head.size + column + part, result, left, whole);
      }
    }
  }
}

// In float64: squares of small numbers would underflow.
template <typename Acc>
__global__ void __launch_bounds__(kWarpSize) input_norms(Table<DecodeNorm> table, int64_t batch) {
  for (int64_t item = blockIdx.x; item < table.count * batch; item += gridDim.x) {
    const DecodeNorm& norm = table.entries[item / batch].part;
    const Acc* row = static_cast<const Acc*>(norm.in) + item % batch * norm.columns;
    double square = 0;
    for (int64_t k = threadIdx.x; k < norm.columns; k += kWarpSize)
      square += static_cast<double>(row[k]) * static_cast<double>(row[k]);
    square = warp_sum(square);
    if (threadIdx.x == 0) static_cast<Acc*>(norm.norms)[item % batch] = static_cast<Acc>(sqrt(square));
  }
}

bool multiple_of_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T>
Entry<DecodeMap> entry(const DecodeMap& map, int64_t first) {
  return {map, first, multiple_of_16(map.weight) && multiple_of_16(map.in) && map.columns % kPack<T> == 0};
}
template <typename T>
Entry<DecodeHead> entry(const DecodeHead& head, int64_t first) {
  return {head, first,
          multiple_of_16(head.basis) && multiple_of_16(head.out) && head.size % kPack<T> == 0 &&
              head.stride % kPack<T> == 0};
}
template <typename T>
Entry<DecodeNorm> entry(const DecodeNorm& norm, int64_t first) {
  return {norm, first, false};
}

template <typename T>
int64_t items_of(const DecodeMap& map) {
  return (map.rows + kMapRows - 1) / kMapRows;
}
template <typename T>
int64_t items_of(const DecodeHead& head) {
  return (head.size + kThreads * kPack<T> - 1) / (kThreads * kPack<T>);
}
template <typename T>
int64_t items_of(const DecodeNorm&) {
  return 1;
}

// Calls work(table) for one table after another.
template <typename T, typename Part, typename Work>
void for_tables(const DecodeStage<Part>& stage, const Work& work) {
  for (int64_t start = 0; start < stage.count; start += kTable) {
    Table<Part> table{};
    for (int64_t p = start; p < stage.count && table.count < kTable; ++p) {
      table.entries[table.count++] = entry<T>(stage.parts[p], table.items);
      table.items += items_of<T>(stage.parts[p]);
    }
    if (table.items > 0) work(table);
  }
}

// Calls work(first sample, samples) for kMostSamples samples after another.
template <typename Work>
void for_samples(int64_t batch, const Work& work) {
  for (int64_t start = 0; start < batch; start += kMostSamples)
    work(start, static_cast<int>(batch - start < kMostSamples ? batch - start : kMostSamples));
}

template <typename T>
void run_maps(const DecodeStage<DecodeMap>& stage, Activation activation, cudaStream_t stream) {
  for_tables<T>(stage, [&](const Table<DecodeMap>& table) {
    for_samples(stage.batch, [&](int64_t start, int samples) {
      const auto kernel = samples == 1   ? map_rows<T, 1>
                          : samples == 2 ? map_rows<T, 2>
                          : samples <= 4 ? map_rows<T, 4>
                                         : map_rows<T, kMostSamples>;
      launch(kernel, grid_for((table.items + kWarps - 1) / kWarps), kThreads, 0, stream, table, start, samples,
             activation);
    });
  });
}

template <typename T>
void run_heads(const DecodeStage<DecodeHead>& stage, cudaStream_t stream) {
  for_tables<T>(stage, [&](const Table<DecodeHead>& table) {
    for_samples(stage.batch, [&](int64_t start, int samples) {
      const auto kernel = samples == 1   ? head_columns<T, 1>
                          : samples == 2 ? head_columns<T, 2>
                          : samples <= 4 ? head_columns<T, 4>
                                         : head_columns<T, kMostSamples>;
      launch(kernel, grid_for(table.items), kThreads, sizeof(Coefficients<Accumulation<T>>), stream, table, start,
             samples);
    });
  });
}

template <typename T>
void run_norms(const DecodeStage<DecodeNorm>& stage, cudaStream_t stream) {
  if (stage.batch == 0) return;
  for_tables<T>(stage, [&](const Table<DecodeNorm>& table) {
    launch(input_norms<Accumulation<T>>, grid_for(table.count * stage.batch), kWarpSize, 0, stream, table, stage.batch);
  });
}

}  // namespace

const char* decode_maps_cuda(DType dtype, const DecodeStage<DecodeMap>& stage, Activation activation, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: run_maps<float>(stage, activation, s); break;
    case DType::kFloat64: run_maps<double>(stage, activation, s); break;
    case DType::kBFloat16: run_maps<BFloat16>(stage, activation, s); break;
  }
  return launch_error();
}

const char* decode_heads_cuda(DType dtype, const DecodeStage<DecodeHead>& stage, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: run_heads<float>(stage, s); break;
    case DType::kFloat64: run_heads<double>(stage, s); break;
    case DType::kBFloat16: run_heads<BFloat16>(stage, s); break;
  }
  return launch_error();
}

const char* decode_norms_cuda(DType dtype, const DecodeStage<DecodeNorm>& stage, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  dtype == DType::kFloat64 ? run_norms<double>(stage, s) : run_norms<float>(stage, s);
  return launch_error();
}

}  // namespace r2f
