#include "forward.cuh"

namespace brn {

template cudaError_t launch_forward<float>(const ForwardArguments&, const Plan&, void*, cudaStream_t);

}  // namespace brn
