#include "backward.cuh"

namespace brn {

template cudaError_t launch_backward<Float16>(const BackwardArguments&, const Plan&, void*, cudaStream_t);

}  // namespace brn
