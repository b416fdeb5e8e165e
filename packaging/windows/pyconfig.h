// What Python's headers ask of a Windows of 64 bits, for packaging/check_targets.sh alone: the headers are the same on
// all systems but for this one file, and here there is the one of this system. Nothing that is built includes it.
#define MS_WINDOWS
#define MS_WIN64
#define HAVE_DECLSPEC_DLL
#define HAVE_PY_SSIZE_T 1
#define HAVE_STDDEF_H
#define PY_SSIZE_T_MAX LLONG_MAX
#define SIZEOF_FPOS_T 8
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_TIME_T 8
#define SIZEOF_VOID_P 8
#define SIZEOF_WCHAR_T 2
typedef long long Py_ssize_t;
