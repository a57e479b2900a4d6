// Nothing: without CUDA the kernels convert by math.h.
#pragma once
