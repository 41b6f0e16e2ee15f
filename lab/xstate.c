/* Lets a User Mode Linux of before 6.13 set the registers of its processes on a CPU with AMX.
 *
 * It keeps 2696 bytes of extended state, which is all up to AVX-512, and hands them to PTRACE_SETREGSET; the host's
 * kernel takes nothing but the whole state, with AMX another 8 KiB. Those stay in their initial state here: nothing
 * inside can ask for the right to use them. Sources: ptrace(2); the host kernel's arch/x86/kernel/fpu/regset.c;
 * Intel's Software Developer's Manual, volume 1, chapter 13.4.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define XSTATE_BV 512 /* where the XSAVE header says which components are in use */
#define AMX (3ull << 17)

static char whole[1 << 16] __attribute__((aligned(64)));
static size_t size;

long ptrace(enum __ptrace_request request, ...)
{
	va_list words;
	va_start(words, request);
	pid_t pid = va_arg(words, pid_t);
	void *addr = va_arg(words, void *), *data = va_arg(words, void *);
	va_end(words);
	struct iovec *part = data, all = {whole, sizeof whole};
	if (request == PTRACE_SETREGSET && addr == (void *)NT_X86_XSTATE) {
		if (size == 0 && syscall(SYS_ptrace, PTRACE_GETREGSET, pid, addr, &all) == 0) {
			size = all.iov_len;
			memset(whole, 0, size);
		}
		if (part->iov_len < size) {
			memcpy(whole, part->iov_base, part->iov_len);
			*(uint64_t *)(whole + XSTATE_BV) &= ~AMX;
			all.iov_len = size;
			data = &all;
		}
	}
	long result;
	if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
		long word;
		result = syscall(SYS_ptrace, request, pid, addr, &word);
		return result < 0 ? result : word;
	}
	return syscall(SYS_ptrace, request, pid, addr, data);
}
