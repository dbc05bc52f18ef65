# SPDX-License-Identifier: Apache-2.0
# FlashInfer's package carries its own headers and CUTLASS's: found by FLASHINFER_DIR (the package's folder), or import.
function(find_flashinfer result)
  if(NOT "$ENV{FLASHINFER_DIR}" STREQUAL "")
    set(folder "$ENV{FLASHINFER_DIR}")
    set(how "FLASHINFER_DIR")
  else()
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -c
              "import importlib.util as u; print(u.find_spec('flashinfer').submodule_search_locations[0])"
      OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
    if(failed)
      message(FATAL_ERROR "FlashInfer isn't there: ${Python3_EXECUTABLE} can't import it; install flashinfer-python or "
                          "set FLASHINFER_DIR to its package's folder")
    endif()
    set(how "import flashinfer")
  endif()
  set(data ${folder}/data)
  foreach(part include cutlass/include cutlass/tools/util/include csrc)
    if(NOT IS_DIRECTORY ${data}/${part})
      message(FATAL_ERROR "${how} gives ${folder}, which has no data/${part}, expected the folder of an installed "
                          "flashinfer-python 0.7 or newer")
    endif()
  endforeach()
  message(STATUS "FlashInfer's headers: ${data} (${how})")
  set(${result} ${data}/include ${data}/csrc ${data}/cutlass/include ${data}/cutlass/tools/util/include PARENT_SCOPE)
endfunction()
