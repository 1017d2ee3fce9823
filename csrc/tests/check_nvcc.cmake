# Compiles SOURCE with NVCC for two architectures and to PTX, with warnings as errors. Fails if a kernel spills
# registers. If there is a CUOBJDUMP, also fails if a source that calls load_pack or load_streaming has no
# 128-bit load in its machine code.
execute_process(
  COMMAND ${NVCC} -O3 -std=c++17 -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90
    -gencode=arch=compute_90,code=compute_90 -Werror all-warnings -Xptxas -v -I${ROOT} -I${ROOT}/include -c ${SOURCE} -o ${OBJECT}
  RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "nvcc failed:\n${text}")
endif()
if(text MATCHES "[1-9][0-9]* bytes spill")
  message(FATAL_ERROR "a kernel spills registers:\n${text}")
endif()

get_filename_component(folder ${SOURCE} DIRECTORY)
get_filename_component(op ${SOURCE} NAME_WE)
file(GLOB parts ${SOURCE} ${folder}/${op}_*.h)
foreach(part ${parts})
  file(READ ${part} code_of_part)
  string(APPEND code "${code_of_part}")
endforeach()
if(CUOBJDUMP AND code MATCHES "load_pack|load_streaming")
  get_filename_component(tools ${CUOBJDUMP} DIRECTORY)  # nvdisasm lies beside it
  set(ENV{PATH} "${tools}:$ENV{PATH}")
  execute_process(COMMAND ${CUOBJDUMP} -sass ${OBJECT} RESULT_VARIABLE result OUTPUT_VARIABLE sass ERROR_VARIABLE text)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "cuobjdump failed:\n${text}")
  endif()
  if(NOT sass MATCHES "LDG\\.E[A-Z.]*\\.128")
    message(FATAL_ERROR "no 128-bit load in ${SOURCE}")
  endif()
endif()
