#include "backward.cuh"

namespace brn {

template cudaError_t launch_backward<double>(const BackwardArguments&, const Plan&, void*, cudaStream_t);

}  // namespace brn
