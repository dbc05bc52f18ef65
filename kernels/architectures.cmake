# SPDX-License-Identifier: Apache-2.0
# Which GPUs to compile for, as CMake writes them: "90-real" is machine code, "90-virtual" is PTX, "90" is both.
#
# The first of these that is set decides: -DCMAKE_CUDA_ARCHITECTURES, the environment's CMAKE_CUDA_ARCHITECTURES,
# TORCH_CUDA_ARCH_LIST as torch's own extensions read it ("8.0;9.0 12.0+PTX", "12.0a", "Blackwell"), the default.

# One fat binary for the cards that vLLM serves on. Machine code runs on later minors of its major too (8.0 on 8.6,
# 10.0 on 10.3); 8.9 and 12.1 have their own since their schedules differ. The PTX is for cards that don't exist yet.
set(DEFAULT_ARCHITECTURES 80-real 89-real 90-real 100-real 120-real 121-real 121-virtual)

# torch's names for families (torch.utils.cpp_extension); what is older than sm_80 has no BF16 tensor cores.
set(NAMED_Ampere 8.0 8.6+PTX)
set(NAMED_Ada 8.9+PTX)
set(NAMED_Hopper 9.0+PTX)
set(NAMED_Blackwell 10.0 10.3 12.0 12.1+PTX)

# TORCH_CUDA_ARCH_LIST's text -> `result`, CMake's list.
function(architectures_from_torch text result)
  string(REGEX REPLACE "[ ,;]+" ";" entries "${text}")
  set(expanded)
  foreach(entry IN LISTS entries)
    if(DEFINED NAMED_${entry})
      list(APPEND expanded ${NAMED_${entry}})
    elseif(NOT entry STREQUAL "")
      list(APPEND expanded ${entry})
    endif()
  endforeach()
  set(architectures)
  foreach(entry IN LISTS expanded)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST has '${entry}', expected a capability such as 9.0, 12.0a or 12.0+PTX, "
                          "or one of Ampere, Ada, Hopper, Blackwell")
    endif()
    set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3})
    set(ptx "${CMAKE_MATCH_4}")
    if(CMAKE_MATCH_1 LESS 8)
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST has '${entry}', expected 8.0 or newer: BF16 tensor cores begin there")
    endif()
    list(APPEND architectures ${number}-real)
    if(ptx)
      list(APPEND architectures ${number}-virtual)
    endif()
  endforeach()
  if(NOT architectures)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST is '${text}', expected at least one capability such as 12.0")
  endif()
  list(REMOVE_DUPLICATES architectures)
  set(${result} ${architectures} PARENT_SCOPE)
endfunction()

# The default, without what this nvcc is too old for.
function(default_architectures nvcc result)
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  set(architectures)
  foreach(architecture IN LISTS DEFAULT_ARCHITECTURES)
    string(REGEX MATCH "^[0-9]+" number ${architecture})
    if(known MATCHES "compute_${number}\n")
      list(APPEND architectures ${architecture})
    endif()
  endforeach()
  set(${result} ${architectures} PARENT_SCOPE)
endfunction()

function(choose_architectures nvcc result)
  if(CMAKE_CUDA_ARCHITECTURES)
    set(architectures ${CMAKE_CUDA_ARCHITECTURES})
  elseif(NOT "$ENV{CMAKE_CUDA_ARCHITECTURES}" STREQUAL "")
    set(architectures $ENV{CMAKE_CUDA_ARCHITECTURES})
  elseif(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    architectures_from_torch("$ENV{TORCH_CUDA_ARCH_LIST}" architectures)
  else()
    default_architectures(${nvcc} architectures)
  endif()
  set(${result} ${architectures} PARENT_SCOPE)
endfunction()

# Of the chosen architectures those that have block-scaled products, by the names under which nvcc compiles them: for
# 12.0 and 12.1 together their family, or each its own where nvcc is older than 12.9; none where it is older than 12.8.
function(fp4_architectures nvcc architectures result)
  string(REGEX MATCHALL "12[01]" chosen "${architectures}")
  list(REMOVE_DUPLICATES chosen)
  set(${result} "" PARENT_SCOPE)
  if(NOT chosen)
    return()
  endif()
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE said ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" found "${said}")
  set(release "${CMAKE_MATCH_1}")
  if(NOT found OR release VERSION_LESS 12.8)
    return()
  elseif(release VERSION_LESS 12.9)
    list(TRANSFORM chosen REPLACE "12[01]" "\\0a-real")
  elseif("${chosen}" MATCHES 120)
    set(chosen 120f-real)
  else()
    set(chosen 121f-real)
  endif()
  set(${result} "${chosen}" PARENT_SCOPE)
endfunction()

# cmake -P architectures.cmake: say what would be built, for tests and the curious.
if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  find_program(NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
  choose_architectures("${NVCC}" architectures)
  if(FP4)  # -DFP4=ON: what of it has the FP4 kernels
    fp4_architectures("${NVCC}" "${architectures}" architectures)
  endif()
  message("${architectures}")
endif()
