#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace emulation {
namespace {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, at_barrier, at_shuffle, done };

// Made once and used again by every block. Entered by swapcontext; from then on the faster longjmp, without system
// calls.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start = {};
  jmp_buf resume = {};
  bool started = false;
  State state = State::done;
  int lanes = 0;
  uint64_t value = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
jmp_buf scheduler;
ucontext_t scheduler_context;
const std::function<void()>* body_of_block;
int current = 0;

void suspend(State state) {
  Fiber& own = *fibers[current];
  own.state = state;
  if (_setjmp(own.resume) == 0) _longjmp(scheduler, 1);
}

void run_forever() {
  for (;;) {
    (*body_of_block)();
    suspend(State::done);
  }
}

void resume(int thread) {
  Fiber& fiber = *fibers[thread];
  current = thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, run_forever, 0);
  swapcontext(&scheduler_context, &fiber.start);
}

// Threads [first, end) if all of them wait there.
bool all_at(State state, int first, int end) {
  for (int i = first; i < end; ++i) {
    if (fibers[i]->state != state) return false;
  }
  return true;
}

bool shuffle_of_warp(int first) {
  if (!all_at(State::at_shuffle, first, first + kWarpSize)) return false;
  uint64_t values[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) values[i] = fibers[first + i]->value;
  for (int i = 0; i < kWarpSize; ++i) {
    Fiber& fiber = *fibers[first + i];
    if (fiber.lanes != fibers[first]->lanes) abort();  // of another shuffle
    fiber.value = values[i ^ fiber.lanes];
    fiber.state = State::ready;
  }
  return true;
}

bool barrier_of_block(int threads) {
  if (!all_at(State::at_barrier, 0, threads)) return false;
  uint64_t any = 0;
  for (int i = 0; i < threads; ++i) any |= fibers[i]->value;
  for (int i = 0; i < threads; ++i) {
    fibers[i]->value = any;
    fibers[i]->state = State::ready;
  }
  return true;
}

}  // namespace

void run_block(int threads, const std::function<void()>& body) {
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  body_of_block = &body;
  for (int i = 0; i < threads; ++i) fibers[i]->state = State::ready;
  while (!all_at(State::done, 0, threads)) {
    bool moved = false;
    const int first = static_cast<int>(random() % threads), step = random() % 2 == 0 ? 1 : threads - 1;
    for (int k = 0, thread = first; k < threads; ++k, thread = (thread + step) % threads) {
      if (fibers[thread]->state != State::ready) continue;
      resume(thread);
      moved = true;
    }
    for (int warp = 0; warp < threads; warp += kWarpSize) moved = shuffle_of_warp(warp) || moved;
    moved = barrier_of_block(threads) || moved;
    if (moved) continue;
    fputs("threads of a block wait for others that never come\n", stderr);
    abort();
  }
}

unsigned current_thread() { return current; }

int barrier(int predicate) {
  fibers[current]->value = predicate != 0;
  suspend(State::at_barrier);
  return static_cast<int>(fibers[current]->value);
}

uint64_t shuffle_xor(uint64_t value, int lanes) {
  fibers[current]->value = value;
  fibers[current]->lanes = lanes;
  suspend(State::at_shuffle);
  return fibers[current]->value;
}

uint64_t random() {  // xorshift64
  static uint64_t state = 88172645463325252;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

}  // namespace emulation
