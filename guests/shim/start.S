# Entry of a thread made by `wasi.thread-spawn`: sets the stack pointer before
# any C code runs, then goes on in C.
	.globaltype	__stack_pointer, i32
	.functype	keel_thread_main (i32, i32) -> ()
	.functype	__wasm_init_tls (i32) -> ()
	.export_name	wasi_thread_start, wasi_thread_start
	.globl	wasi_thread_start
	.type	wasi_thread_start,@function
wasi_thread_start:
	.functype	wasi_thread_start (i32, i32) -> ()
	# struct start { void *stack; void *tls; ... }
	local.get 1
	i32.load  0
	global.set __stack_pointer
	local.get 1
	i32.load  4
	call __wasm_init_tls
	local.get 0
	local.get 1
	call keel_thread_main
	end_function
