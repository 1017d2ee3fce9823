// Runs a CUDA kernel's source on the CPU, so that its logic is tested where there is no GPU. Included by r2f/cuda.h,
// never directly.
//
// A block's threads are fibers of one OS thread, switched only at barriers and warp operations. EMU_SCHED selects
// the order in which they run (0 forward, 1 reverse, n >= 2 a shuffle seeded by n), so that a missing barrier shows as
// different results. EMU_THREADS > 1 runs blocks on as many OS threads; fibers and barriers are annotated for
// ThreadSanitizer, which then detects races within and between blocks. Shared memory starts as NaN. A deadlock, threads
// that wait at different barriers and a bad launch configuration are errors. Speed is not modelled.
//
// Supported: threadIdx .. gridDim, dynamic shared memory (R2F_DYNAMIC_SHARED), __syncthreads, __syncwarp,
// __shfl_xor_sync, mma_bfloat16. Other warp operations can be built on `exchange`. Not supported: inline PTX, wmma,
// cp.async, cooperative groups, static shared memory, atomics. x86-64 only (the fiber switch).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_TSAN(...)
#endif
// The scheduler moves between stacks and must stay invisible to the sanitizers.
#define EMU_HIDDEN __attribute__((no_sanitize("thread"), no_sanitize("address"), noinline))

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace r2f::emu {

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 64 << 10, kMaxSharedBytes = 227 << 10;

enum class State { kReady, kAtBarrier, kAtWarpOp, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  dim3 index;
  int lane = 0, warp = 0, line = 0, source_lane = 0, place = 0;  // place: position in the schedule
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  void* tsan_fiber = nullptr;
};

// The state of the block that an OS thread is running.
struct Block {
  Fiber fibers[kMaxThreads];  // plain arrays: a container's own functions would be visible to the sanitizers
  int order[kMaxThreads];
  int threads = 0, alive = 0, waiting = 0;
  bool reverse = false;
  Fiber* current = nullptr;
  void* main_stack_pointer = nullptr;
  void* main_tsan_fiber = nullptr;
  void (*call)(void*) = nullptr;
  void* kernel = nullptr;
  dim3 grid_dim, block_dim, block_index;
  const char* error = nullptr;
  char start_tag = 0, barrier_tag = 0, end_tag = 0,
       warp_tags[kMaxThreads / kWarp] = {};  // addresses of TSan's happens-before annotations
  alignas(16) unsigned char shared[kMaxSharedBytes];
};
inline thread_local Block* block = nullptr;
inline int launches = 0;  // of kernels so far; the tests count them

// Saves the callee-saved registers and the stack pointer of one fiber and restores another's.
extern "C" void r2f_emu_switch(void** save, void* load);
__asm__(R"(
.text
.weak r2f_emu_switch
.type r2f_emu_switch,@function
r2f_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

EMU_HIDDEN inline void return_to_main() {
  Fiber* me = block->current;
  EMU_TSAN(__tsan_switch_to_fiber(block->main_tsan_fiber, 1);)
  r2f_emu_switch(&me->stack_pointer, block->main_stack_pointer);
}

// Switches to another ready fiber, if possible of the same warp, so that a warp runs ahead as far as barriers allow.
EMU_HIDDEN inline void give_way() {
  Block& b = *block;
  Fiber* me = b.current;
  const int first = me->warp * kWarp, lanes = std::min(kWarp, b.threads - first);
  Fiber* next = nullptr;
  for (int k = 1; k <= lanes && next == nullptr; ++k) {
    Fiber& other = b.fibers[first + (b.reverse ? me->lane - k + lanes : me->lane + k) % lanes];
    if (other.state == State::kReady) next = &other;
  }
  for (int k = 1; k <= b.threads && next == nullptr; ++k) {
    Fiber& other = b.fibers[b.order[(me->place + k) % b.threads]];
    if (other.state == State::kReady) next = &other;
  }
  if (next == me) return;
  if (next == nullptr) {
    if (b.alive > 0 && b.error == nullptr) b.error = "deadlock: some threads wait where the others never come";
    return return_to_main();
  }
  b.current = next;
  EMU_TSAN(__tsan_switch_to_fiber(next->tsan_fiber, 1);)
  r2f_emu_switch(&me->stack_pointer, next->stack_pointer);
}

EMU_HIDDEN inline void open_barrier() {
  Block& b = *block;
  int line = -1;
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[i];
    if (f.state != State::kAtBarrier) continue;
    if (line >= 0 && f.line != line) b.error = "threads of one block met at different __syncthreads";
    line = f.line;
    f.state = State::kReady;
  }
  b.waiting = 0;
}

EMU_HIDDEN inline void syncthreads(int line) {
  Block& b = *block;
  EMU_TSAN(__tsan_release(&b.barrier_tag);)
  b.current->line = line;
  b.current->state = State::kAtBarrier;
  if (++b.waiting == b.alive) {
    open_barrier();
    if (b.error != nullptr) return_to_main();
  } else {
    give_way();
  }
  EMU_TSAN(__tsan_acquire(&b.barrier_tag);)
}

// Every lane of `mask` contributes a value and receives that of its `source_lane`.
EMU_HIDDEN inline uint64_t exchange(unsigned mask, uint64_t value, int source_lane, int line) {
  Block& b = *block;
  Fiber* me = b.current;
  Fiber* warp = &b.fibers[me->warp * kWarp];
  const int lanes = std::min(kWarp, b.threads - me->warp * kWarp);
  if ((mask >> me->lane & 1u) == 0)
    b.error = "a lane calls a warp operation whose mask leaves it out", return_to_main();
  me->value = value, me->source_lane = source_lane, me->mask = mask, me->line = line, me->state = State::kAtWarpOp;
  for (int l = 0; l < lanes; ++l) {
    const bool here = warp[l].state == State::kDone || (warp[l].state == State::kAtWarpOp && warp[l].mask == mask);
    if ((mask >> l & 1u) != 0 && !here) {
      give_way();
      return me->result;
    }
  }
  for (int l = 0; l < lanes; ++l) {
    Fiber& f = warp[l];
    if ((mask >> l & 1u) == 0 || f.state != State::kAtWarpOp) continue;
    if (f.line != line) b.error = "lanes of one mask met at different warp operations";
    const bool valid = f.source_lane < lanes && (mask >> f.source_lane & 1u) != 0;
    f.result = valid ? warp[f.source_lane].value : ~uint64_t{0};  // NaN
  }
  for (int l = 0; l < lanes; ++l)
    if ((mask >> l & 1u) != 0 && warp[l].state == State::kAtWarpOp) warp[l].state = State::kReady;
  if (b.error != nullptr) return_to_main();
  return me->result;
}

EMU_HIDDEN inline void syncwarp(int line, unsigned mask = 0xffffffffu) {  // orders memory, unlike a shuffle
  EMU_TSAN(char* tag = &block->warp_tags[block->current->warp]; __tsan_release(tag);)
  exchange(mask, 0, block->current->lane, line);
  EMU_TSAN(__tsan_acquire(tag);)
}

// The product of r2f/cuda.h's mma_bfloat16. Lane 4 g + t holds rows g and g + 8 of a and column g of b, at the indices
// 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of the summed dimension, and the columns 2 t and 2 t + 1 of rows g and g + 8 of c.
EMU_HIDDEN inline void mma_bfloat16(int line, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  Fiber* me = block->current;
  const Fiber* warp = &block->fibers[me->warp * kWarp];
  const int g = me->lane / 4, t = me->lane % 4;
  const auto registers = reinterpret_cast<uint64_t>(mine);
  exchange(0xffffffffu, registers, me->lane, line);
  for (int place = 0; place < 16; ++place) {  // register place / 8 of lane place % 8 / 2, its half place % 2
    const int lane = place % 8 / 2, shift = place % 2 * 16;
    float a[2], b[2];
    for (int i = 0; i < 2; ++i) {
      const auto* rows = reinterpret_cast<const uint32_t*>(warp[g * 4 + lane].value);
      const auto* column = reinterpret_cast<const uint32_t*>(warp[(2 * t + i) * 4 + lane].value);
      const uint32_t a_bits = rows[place / 8 * 2 + i] >> shift << 16, b_bits = column[4 + place / 8] >> shift << 16;
      __builtin_memcpy(&a[i], &a_bits, 4);
      __builtin_memcpy(&b[i], &b_bits, 4);
    }
    for (int i = 0; i < 4; ++i) c[i] += a[i / 2] * b[i % 2];
  }
  exchange(0xffffffffu, registers, me->lane, line);  // no lane continues before all others have read its registers
}

EMU_HIDDEN inline void fiber_main() {
  EMU_TSAN(__tsan_acquire(&block->start_tag);)
  block->call(block->kernel);
  EMU_TSAN(__tsan_release(&block->end_tag);)
  Block& b = *block;
  b.current->state = State::kDone;
  if (--b.alive > 0 && b.waiting == b.alive) open_barrier();
  if (b.error != nullptr || b.alive == 0) return_to_main();
  give_way();
  std::abort();  // a finished fiber is never resumed
}

EMU_HIDDEN inline void run_block(Block& b, int schedule) {
  b.threads = b.alive = static_cast<int>(b.block_dim.x * b.block_dim.y * b.block_dim.z);
  b.waiting = 0, b.error = nullptr, b.reverse = schedule == 1;
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[i];
    if (f.stack == nullptr) {
      f.stack.reset(new char[kStackBytes]);
      EMU_TSAN(f.tsan_fiber = __tsan_create_fiber(0);)
    }
    // Builds the stack of a fiber whose first switch returns into fiber_main: from the stack pointer upwards six saved
    // registers, then fiber_main's address, with the alignment that a call produces.
    const auto top = reinterpret_cast<uintptr_t>(f.stack.get() + kStackBytes - 64) & ~uintptr_t{63};
    void** entry = reinterpret_cast<void**>(top);
    *entry = reinterpret_cast<void*>(&fiber_main);
    std::memset(entry - 6, 0, 6 * sizeof(void*));
    f.stack_pointer = entry - 6;
    f.state = State::kReady, f.lane = i % kWarp, f.warp = i / kWarp;
    const unsigned u = static_cast<unsigned>(i);
    f.index = dim3(u % b.block_dim.x, u / b.block_dim.x % b.block_dim.y, u / (b.block_dim.x * b.block_dim.y));
    b.order[i] = b.reverse ? b.threads - 1 - i : i;
  }
  if (schedule >= 2) std::shuffle(b.order, b.order + b.threads, std::mt19937(schedule * 7919u + b.block_index.x));
  for (int i = 0; i < b.threads; ++i) b.fibers[b.order[i]].place = i;
  b.current = &b.fibers[b.order[0]];
  EMU_TSAN(b.main_tsan_fiber = __tsan_get_current_fiber(); __tsan_release(&b.start_tag);)
  EMU_TSAN(__tsan_switch_to_fiber(b.current->tsan_fiber, 1);)
  r2f_emu_switch(&b.main_stack_pointer, b.current->stack_pointer);
  EMU_TSAN(__tsan_acquire(&b.end_tag); __tsan_acquire(&b.barrier_tag);)
}

inline int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, void (*call)(void*), void* kernel) {
  const uint64_t per_block = uint64_t{threads.x} * threads.y * threads.z;
  if (per_block == 0 || per_block > kMaxThreads) throw std::runtime_error("emu: bad block size");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emu: bad grid size");
  if (shared_bytes > kMaxSharedBytes) throw std::runtime_error("emu: too much shared memory");
  ++launches;
  static const int schedule = setting("EMU_SCHED", 0), workers = std::max(1, setting("EMU_THREADS", 1));
  static auto& pool =
      *new std::vector<std::unique_ptr<Block>>;  // never destroyed: fibers are reused until the process ends
  while (static_cast<int>(pool.size()) < workers) pool.push_back(std::make_unique<Block>());
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  std::mutex mutex;
  std::string error;
  const auto work = [&](int worker) {
    block = pool[worker].get();
    Block& b = *block;
    b.grid_dim = grid, b.block_dim = threads, b.call = call, b.kernel = kernel;
    for (int64_t k = worker; k < blocks; k += workers) {
      const int64_t i = schedule == 1 ? blocks - 1 - k : k;
      b.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / (int64_t{grid.x} * grid.y));
      std::memset(b.shared, 0xff, shared_bytes);  // NaN: reads of unwritten shared memory show in the result
      run_block(b, schedule);
      if (b.error == nullptr) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::string("emu: ") + b.error + " (block " + std::to_string(i) + ")";
      return;
    }
  };
  if (workers == 1) {
    work(0);
  } else {
    std::vector<std::thread> crew;
    for (int w = 0; w < workers; ++w) crew.emplace_back(work, w);
    for (auto& member : crew) member.join();
  }
  if (!error.empty()) throw std::runtime_error(error);
}

template <typename T>
T shuffle(unsigned mask, T value, int source_lane, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace r2f::emu

#define threadIdx (r2f::emu::block->current->index)
#define blockIdx (r2f::emu::block->block_index)
#define blockDim (r2f::emu::block->block_dim)
#define gridDim (r2f::emu::block->grid_dim)
#define __syncthreads() r2f::emu::syncthreads(__LINE__)
#define __syncwarp() r2f::emu::syncwarp(__LINE__)
#define __shfl_xor_sync(mask, value, other) \
  r2f::emu::shuffle(mask, value, r2f::emu::block->current->lane ^ (other), __LINE__)
