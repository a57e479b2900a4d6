// Nothing: without CUDA the kernels convert by values.h.
#pragma once
