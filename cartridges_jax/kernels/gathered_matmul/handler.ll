; XLA calls the function $name below through the C interface that jaxlib's xla/ffi/api/c_api.h declares. It divides the
; work into items and shares them among XLA's threads. The kernel's code is put behind this text: its function `run`
; takes one item after the other until none is left. `docs/cpu_kernel.md` describes the whole.

; These are structs of c_api.h: %Buffer is its XLA_FFI_Buffer, and behind each type stand the names of its fields.
; `interface.py` compares them with the header, so the layout on these lines is the one that is checked.
%Api_Version = type { i64, ptr, i32, i32 } ; struct_size extension_start major_version minor_version
%Api = type { i64, ptr, %Api_Version, ptr } ; struct_size extension_start api_version internal_api
%Args = type { i64, ptr, i64, ptr, ptr } ; struct_size extension_start size types args
%Rets = type { i64, ptr, i64, ptr, ptr } ; struct_size extension_start size types rets
%Attrs = type { i64, ptr, i64, ptr, ptr, ptr } ; struct_size extension_start size types names attrs
%CallFrame = type { i64, ptr, ptr, ptr, i32, %Args, %Rets, %Attrs, ptr } ; struct_size extension_start api ctx stage args rets attrs future
%Buffer = type { i64, ptr, i32, ptr, i64, ptr } ; struct_size extension_start dtype data rank dims
%Extension_Base = type { i64, i32, ptr } ; struct_size type next
%TypeId = type { i64 } ; type_id
%Metadata = type { i64, %Api_Version, i32, %TypeId } ; struct_size api_version traits state_type_id
%Metadata_Extension = type { %Extension_Base, ptr } ; extension_base metadata
%ThreadPool_Schedule_Args = type { i64, ptr, ptr, ptr, ptr } ; struct_size extension_start ctx task data
%Error_Destroy_Args = type { i64, ptr, ptr } ; struct_size extension_start error

; One call's work, shared by the threads that do it. Its fields are: threads that may still look at it, next item, items
; done, number of items, products of one item, number of products; left, left_index, right, right_index, out.
%Job = type { i64, i64, i64, i64, i64, i64, ptr, ptr, ptr, ptr, ptr }

declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define ptr @$name(ptr %frame) {
  %args = alloca %ThreadPool_Schedule_Args
  %destroy_args = alloca %Error_Destroy_Args
  %extension_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 1
  %extension = load ptr, ptr %extension_at
  %has_extension = icmp ne ptr %extension, null
  br i1 %has_extension, label %extended, label %begin
extended:
  %type_at = getelementptr %Extension_Base, ptr %extension, i32 0, i32 1
  %type = load i32, ptr %type_at
  %is_metadata_query = icmp eq i32 %type, 1
  br i1 %is_metadata_query, label %describe, label %begin

describe:                                            ; XLA asks for which version of its interface this is
  %metadata_at = getelementptr %Metadata_Extension, ptr %extension, i32 0, i32 1
  %metadata = load ptr, ptr %metadata_at
  %major_at = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 2
  store i32 $major, ptr %major_at
  %minor_at = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 3
  store i32 $minor, ptr %minor_at
  ret ptr null

begin:
  %inputs_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 5, i32 4
  %inputs = load ptr, ptr %inputs_at
  %outputs_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 6, i32 4
  %outputs = load ptr, ptr %outputs_at
  %left = call ptr @data(ptr %inputs, i64 0)
  %left_index = call ptr @data(ptr %inputs, i64 1)
  %right = call ptr @data(ptr %inputs, i64 2)
  %right_index = call ptr @data(ptr %inputs, i64 3)
  %out = call ptr @data(ptr %outputs, i64 0)
  %right_index_buffer = call ptr @buffer(ptr %inputs, i64 3)
  %dims_at = getelementptr %Buffer, ptr %right_index_buffer, i32 0, i32 5
  %dims = load ptr, ptr %dims_at
  %n = load i64, ptr %dims
  %share = udiv i64 %n, $target_items
  %share_or_1 = call i64 @llvm.umax.i64(i64 %share, i64 1)
  %products_per_item = call i64 @llvm.umin.i64(i64 %share_or_1, i64 $max_products_per_item)
  %rounding = sub i64 %products_per_item, 1
  %rounded = add i64 %n, %rounding
  %groups = udiv i64 %rounded, %products_per_item
  %items = mul i64 %groups, $row_blocks
  %threads_wanted = call i64 @llvm.umin.i64(i64 %items, i64 $cores)
  %threads = call i64 @llvm.umax.i64(i64 %threads_wanted, i64 1)

  %job = call ptr @malloc(i64 ptrtoint (ptr getelementptr (%Job, ptr null, i32 1) to i64))
  %job0 = insertvalue %Job zeroinitializer, i64 %threads, 0
  %job3 = insertvalue %Job %job0, i64 %items, 3
  %job4 = insertvalue %Job %job3, i64 %products_per_item, 4
  %job5 = insertvalue %Job %job4, i64 %n, 5
  %job6 = insertvalue %Job %job5, ptr %left, 6
  %job7 = insertvalue %Job %job6, ptr %left_index, 7
  %job8 = insertvalue %Job %job7, ptr %right, 8
  %job9 = insertvalue %Job %job8, ptr %right_index, 9
  %job10 = insertvalue %Job %job9, ptr %out, 10
  store %Job %job10, ptr %job

  %api_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 2
  %api = load ptr, ptr %api_at
  %context_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 3
  %context = load ptr, ptr %context_at
  %args0 = insertvalue %ThreadPool_Schedule_Args zeroinitializer, i64 ptrtoint (ptr getelementptr (%ThreadPool_Schedule_Args, ptr null, i32 1) to i64), 0
  %args2 = insertvalue %ThreadPool_Schedule_Args %args0, ptr %context, 2
  %args3 = insertvalue %ThreadPool_Schedule_Args %args2, ptr @help, 3
  %args4 = insertvalue %ThreadPool_Schedule_Args %args3, ptr %job, 4
  store %ThreadPool_Schedule_Args %args4, ptr %args
  %functions = getelementptr %Api, ptr %api, i32 1   ; they stand behind the table's head
  %schedule_at = getelementptr ptr, ptr %functions, i32 $schedule
  %schedule = load ptr, ptr %schedule_at
  br label %more

more:                                                ; every other thread gets one task
  %i = phi i64 [ 1, %begin ], [ %next_i, %counted ]
  %is_needed = icmp ult i64 %i, %threads
  br i1 %is_needed, label %ask, label %work
ask:
  %error = call ptr %schedule(ptr %args)
  %is_refused = icmp ne ptr %error, null
  br i1 %is_refused, label %refused, label %counted
refused:                                             ; XLA has no threads: this one works alone
  %destroy_at = getelementptr ptr, ptr %functions, i32 $destroy
  %destroy = load ptr, ptr %destroy_at
  %destroy_args0 = insertvalue %Error_Destroy_Args zeroinitializer, i64 ptrtoint (ptr getelementptr (%Error_Destroy_Args, ptr null, i32 1) to i64), 0
  %destroy_args2 = insertvalue %Error_Destroy_Args %destroy_args0, ptr %error, 2
  store %Error_Destroy_Args %destroy_args2, ptr %destroy_args
  call void %destroy(ptr %destroy_args)
  call void @release(ptr %job)
  br label %counted
counted:
  %next_i = add i64 %i, 1
  br label %more

work:
  call void @run(ptr %job)
  %done_at = getelementptr %Job, ptr %job, i32 0, i32 2
  br label %wait
wait:                                                ; other threads may still do the items that they took
  %turn = phi i64 [ 0, %work ], [ %next_turn, %again ], [ %next_turn, %yield ]
  %next_turn = add i64 %turn, 1
  %done = load atomic i64, ptr %done_at acquire, align 8
  %is_done = icmp eq i64 %done, %items
  br i1 %is_done, label %end, label %again
again:
  %is_long = icmp ugt i64 %turn, 1000
  br i1 %is_long, label %yield, label %wait
yield:                                               ; one of them may have lost its core to this thread
  %yielded = call i32 @sched_yield()
  br label %wait
end:
  call void @release(ptr %job)
  ret ptr null
}

define private void @help(ptr %job) {                ; it may run only after the call has returned
  call void @run(ptr %job)
  call void @release(ptr %job)
  ret void
}

define private void @release(ptr %job) {             ; the last thread that leaves frees the job
  %threads = atomicrmw sub ptr %job, i64 1 acq_rel
  %is_last = icmp eq i64 %threads, 1
  br i1 %is_last, label %last, label %end
last:
  call void @free(ptr %job)
  br label %end
end:
  ret void
}

define private ptr @data(ptr %buffers, i64 %i) {
  %buffer = call ptr @buffer(ptr %buffers, i64 %i)
  %data_at = getelementptr %Buffer, ptr %buffer, i32 0, i32 3
  %data = load ptr, ptr %data_at
  ret ptr %data
}

define private ptr @buffer(ptr %buffers, i64 %i) {
  %buffer_at = getelementptr ptr, ptr %buffers, i64 %i
  %buffer = load ptr, ptr %buffer_at
  ret ptr %buffer
}
