// The threads of a block as fibers of one thread: each runs until it meets the others, in an order that is random.
#pragma once

#include <cstdint>
#include <functional>

namespace emulation {

// Runs `body` once as each of the threads. Aborts where they would wait for each other forever.
void run_block(int threads, const std::function<void()>& body);

// To be called from within `body`.
unsigned current_thread();
int barrier(int predicate);                       // of all threads of the block: whether any brought one
uint64_t shuffle_xor(uint64_t value, int lanes);  // of all threads of the warp: the value of thread ^ lanes

uint64_t random();

}  // namespace emulation
