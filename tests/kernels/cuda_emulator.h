// What TVM's CUDA C needs to run on a CPU: one fiber for each thread of a block, blocks one by one.
//
// Barriers and shuffles are exact about who has to take part: a barrier that some threads of the
// block can no longer reach, or that only some of them wait at while others wait elsewhere, ends
// the run with an error instead of passing unnoticed. Shared memory holds NaN before every block.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(n)
#define alignas(n) __attribute__((aligned(n)))  // in CUDA it may follow __shared__
#define __shared__ static __attribute__((section("shared_memory")))
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

extern char __start_shared_memory[] __attribute__((weak));
extern char __stop_shared_memory[] __attribute__((weak));

struct Index {
  int x, y, z;
};
static Index threadIdx, blockIdx;

namespace emulator {

enum State { READY, AT_BLOCK, AT_WARP, DONE };
enum Result { FINE = 0, STUCK = 1, LEFT_BEFORE_BARRIER = 2 };

// A fiber begins by its context; from then on jumps go to it and back, which need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool begun;
  std::unique_ptr<char[]> stack;
  State state;
  Index index;
};

static std::vector<Fiber> fibers;
static std::vector<uint64_t> lanes;
static jmp_buf scheduler;
static int current;
static std::function<void()> body;
static const size_t STACK = 256 << 10;

static void enter() {
  body();
  fibers[current].state = DONE;
  _longjmp(scheduler, 1);
}

static void __attribute__((noinline)) resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

static void __attribute__((noinline)) wait(State state) {
  fibers[current].state = state;
  if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

// Releases the fibers [low, high) that wait in `state` if every one that is not done does.
static bool release(State state, int low, int high, bool* left) {
  int waiting = 0, done = 0;
  for (int i = low; i < high; ++i) {
    waiting += fibers[i].state == state;
    done += fibers[i].state == DONE;
  }
  if (waiting == 0 || waiting + done < high - low) return false;
  *left |= done > 0;
  for (int i = low; i < high; ++i) {
    if (fibers[i].state == state) fibers[i].state = READY;
  }
  return true;
}

static int run_block(int threads, bool backwards) {
  if (__start_shared_memory) {
    memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = READY;
    fiber.begun = false;
  }
  for (;;) {
    bool ran = false, all_done = true, left = false;
    for (int i = 0; i < threads; ++i) {
      current = backwards ? threads - 1 - i : i;
      if (fibers[current].state == READY) {
        ran = true;
        threadIdx = fibers[current].index;
        resume(fibers[current]);
      }
      all_done &= fibers[current].state == DONE;
    }
    if (all_done) return FINE;
    if (ran) continue;
    bool released = false;
    for (int low = 0; low < threads; low += 32) {
      released |= release(AT_WARP, low, low + 32 < threads ? low + 32 : threads, &left);
    }
    if (!released) released = release(AT_BLOCK, 0, threads, &left);
    if (left) return LEFT_BEFORE_BARRIER;
    if (!released) return STUCK;
  }
}

template <class... A, size_t... I>
int launch(void (*function)(A...), void** arguments, const int* grid, const int* block,
           bool backwards, std::index_sequence<I...>) {
  int threads = block[0] * block[1] * block[2], blocks = grid[0] * grid[1] * grid[2];
  body = [=] { function(static_cast<A>(arguments[I])...); };
  fibers = std::vector<Fiber>(threads);
  lanes.assign(threads, 0);
  for (int i = 0; i < threads; ++i) {
    fibers[i].stack.reset(new char[STACK]);
    fibers[i].index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
  }
  for (int k = 0; k < blocks; ++k) {
    int b = backwards ? blocks - 1 - k : k;
    blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
    if (int result = run_block(threads, backwards)) return result;
  }
  return FINE;
}

template <class... A>
int launch(void (*function)(A...), void** arguments, const int* grid, const int* block,
           int backwards) {
  return launch(function, arguments, grid, block, backwards != 0,
                std::index_sequence_for<A...>());
}

template <class T>
T exchange(T value, int lane, int width) {
  int own = current, first = own / 32 * 32 + own % 32 / width * width;
  memcpy(&lanes[own], &value, sizeof(T));
  wait(AT_WARP);
  int source = first + lane;
  bool inside = lane >= 0 && lane < width && source < static_cast<int>(lanes.size());
  memcpy(&value, &lanes[inside ? source : own], sizeof(T));
  wait(AT_WARP);
  return value;
}

}  // namespace emulator

static inline void __syncthreads() { emulator::wait(emulator::AT_BLOCK); }
static inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::AT_WARP); }
static inline unsigned __activemask() { return ~0u; }
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  return emulator::exchange(value, lane, width);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by, int width) {
  return emulator::exchange(value, emulator::current % width + by, width);
}

template <class To, class From>
To bits_as(From value) {
  To result;
  static_assert(sizeof(To) == sizeof(From), "");
  memcpy(&result, &value, sizeof(To));
  return result;
}
static inline int __float_as_int(float v) { return bits_as<int>(v); }
static inline float __int_as_float(int v) { return bits_as<float>(v); }
static inline long long __double_as_longlong(double v) { return bits_as<long long>(v); }
static inline double __longlong_as_double(long long v) { return bits_as<double>(v); }
template <class T>
T max(T a, T b) {
  return a != a || a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  return a != a || a < b ? a : b;
}

#define VECTORS(T)                                                              \
  struct T##2 {                                                                 \
    T x, y;                                                                     \
  };                                                                            \
  struct T##4 {                                                                 \
    T x, y, z, w;                                                               \
  };                                                                            \
  static inline T##2 make_##T##2(T x, T y) { return {x, y}; }                   \
  static inline T##4 make_##T##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float)
VECTORS(int)
VECTORS(ushort)
