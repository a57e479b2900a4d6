// The backward's loops for one instruction set.
#include "kernels.h"

namespace brn {

void BRN_EXPORTED(backward)(const BackwardArguments& a, const Parallel& parallel);

void BRN_EXPORTED(backward)(const BackwardArguments& a, const Parallel& parallel) {
  const bool all_dense = is_dense(a.layout, a.dy) && is_dense(a.layout, a.x) && is_dense(a.layout, a.residual) &&
                         is_dense(a.layout, a.dx) && is_dense(a.layout, a.dresidual);
  run_call<BackwardColumns, BackwardPlanes>(a, all_dense, parallel);
}

}  // namespace brn
