#pragma once
#include "matrix.h"

// Runs `job` on `size` threads, the caller's among them; false when a thread cannot be made.
bool pool_run(Job job, void* what, int size);
