#include "forward.cuh"

namespace brn {

template cudaError_t launch_forward<double>(const ForwardArguments&, const Plan&, void*, cudaStream_t);

}  // namespace brn
