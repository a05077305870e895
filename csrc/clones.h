// One library for every x86-64: the loader takes the widest version that the processor has.
// MIXFLOW_PORTABLE, for tests, leaves what compilers make of plain loops elsewhere.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    defined(__gnu_linux__) && !defined(MIXFLOW_PORTABLE)
#define MIXFLOW_ONE_LIBRARY_FOR_X86
#define MIXFLOW_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define MIXFLOW_CLONES
#endif
