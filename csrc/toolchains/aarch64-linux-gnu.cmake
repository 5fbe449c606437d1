# 64-bit ARM under Linux, built on another machine (Debian: g++-aarch64-linux-gnu) and run there (qemu-user-static):
#   cmake -S csrc -B build/aarch64 --toolchain toolchains/aarch64-linux-gnu.cmake
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -L /usr/aarch64-linux-gnu)
