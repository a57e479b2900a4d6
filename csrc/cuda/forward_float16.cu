#include "forward.cuh"

namespace brn {

template cudaError_t launch_forward<Float16>(const ForwardArguments&, const Plan&, void*, cudaStream_t);

}  // namespace brn
