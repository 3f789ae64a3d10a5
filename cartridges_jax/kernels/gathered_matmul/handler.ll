; What XLA calls (jaxlib's xla/ffi/api/c_api.h), and how the work is shared among its threads. Behind it follows the
; kernel: `run` takes one item after the other until none is left.

%Version = type { i64, ptr, i32, i32 }               ; size, extension, major, minor
%Api = type { i64, ptr, %Version, ptr, [$functions x ptr] }  ; size, extension, version, internal, functions
%Values = type { i64, ptr, i64, ptr, ptr }           ; size, extension, count, types, values
%Frame = type { i64, ptr, ptr, ptr, i32, %Values, %Values, %Values, ptr }  ; size, extension, api, context, stage,
                                                                           ; arguments, results, attributes, future
%Buffer = type { i64, ptr, i32, ptr, i64, ptr }      ; size, extension, dtype, data, rank, dimensions
%Question = type { i64, i32, ptr, ptr }              ; size, type and next of an extension, metadata
%Metadata = type { i64, %Version, i32, i64 }         ; size, version, traits, type of the state
%Task = type { i64, ptr, ptr, ptr, ptr }             ; size, extension, context, function, its argument
%Failure = type { i64, ptr, ptr }                    ; size, extension, error

; threads that may still look at it, next item, items done, items, products of one, products; left, left_of, right,
; right_of, out
%Job = type { i64, i64, i64, i64, i64, i64, ptr, ptr, ptr, ptr, ptr }

declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define ptr @$name(ptr %frame) {
  %task = alloca %Task
  %failure = alloca %Failure
  %question_at = getelementptr %Frame, ptr %frame, i32 0, i32 1
  %question = load ptr, ptr %question_at
  %is_extended = icmp ne ptr %question, null
  br i1 %is_extended, label %extended, label %begin
extended:
  %type_at = getelementptr %Question, ptr %question, i32 0, i32 1
  %type = load i32, ptr %type_at
  %is_asked = icmp eq i32 %type, 1
  br i1 %is_asked, label %describe, label %begin

describe:                                            ; for which version of the interface this is
  %metadata_at = getelementptr %Question, ptr %question, i32 0, i32 3
  %metadata = load ptr, ptr %metadata_at
  %major_at = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 2
  store i32 $major, ptr %major_at
  %minor_at = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 3
  store i32 $minor, ptr %minor_at
  ret ptr null

begin:
  %arguments_at = getelementptr %Frame, ptr %frame, i32 0, i32 5, i32 4
  %arguments = load ptr, ptr %arguments_at
  %results_at = getelementptr %Frame, ptr %frame, i32 0, i32 6, i32 4
  %results = load ptr, ptr %results_at
  %left = call ptr @data(ptr %arguments, i64 0)
  %left_of = call ptr @data(ptr %arguments, i64 1)
  %right = call ptr @data(ptr %arguments, i64 2)
  %right_of = call ptr @data(ptr %arguments, i64 3)
  %out = call ptr @data(ptr %results, i64 0)
  %places = call ptr @buffer(ptr %arguments, i64 3)
  %dimensions_at = getelementptr %Buffer, ptr %places, i32 0, i32 5
  %dimensions = load ptr, ptr %dimensions_at
  %n = load i64, ptr %dimensions
  %share = udiv i64 %n, $shares
  %least_1 = call i64 @llvm.umax.i64(i64 %share, i64 1)
  %at_once = call i64 @llvm.umin.i64(i64 %least_1, i64 $most_at_once)
  %less_1 = sub i64 %at_once, 1
  %rounded = add i64 %n, %less_1
  %groups = udiv i64 %rounded, %at_once
  %items = mul i64 %groups, $row_parts
  %threads_or_0 = call i64 @llvm.umin.i64(i64 %items, i64 $cores)
  %threads = call i64 @llvm.umax.i64(i64 %threads_or_0, i64 1)

  %job = call ptr @malloc(i64 88)
  %job0 = insertvalue %Job zeroinitializer, i64 %threads, 0
  %job3 = insertvalue %Job %job0, i64 %items, 3
  %job4 = insertvalue %Job %job3, i64 %at_once, 4
  %job5 = insertvalue %Job %job4, i64 %n, 5
  %job6 = insertvalue %Job %job5, ptr %left, 6
  %job7 = insertvalue %Job %job6, ptr %left_of, 7
  %job8 = insertvalue %Job %job7, ptr %right, 8
  %job9 = insertvalue %Job %job8, ptr %right_of, 9
  %job10 = insertvalue %Job %job9, ptr %out, 10
  store %Job %job10, ptr %job

  %api_at = getelementptr %Frame, ptr %frame, i32 0, i32 2
  %api = load ptr, ptr %api_at
  %context_at = getelementptr %Frame, ptr %frame, i32 0, i32 3
  %context = load ptr, ptr %context_at
  %task2 = insertvalue %Task { i64 40, ptr null, ptr null, ptr @help, ptr null }, ptr %context, 2
  %task4 = insertvalue %Task %task2, ptr %job, 4
  store %Task %task4, ptr %task
  %schedule_at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 $schedule
  %schedule = load ptr, ptr %schedule_at
  br label %more

more:                                                ; one helper for each thread but this
  %i = phi i64 [ 1, %begin ], [ %next_i, %counted ]
  %is_needed = icmp ult i64 %i, %threads
  br i1 %is_needed, label %ask, label %work
ask:
  %error = call ptr %schedule(ptr %task)
  %is_refused = icmp ne ptr %error, null
  br i1 %is_refused, label %refused, label %counted
refused:                                             ; there are no threads: then without
  %destroy_at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 $destroy
  %destroy = load ptr, ptr %destroy_at
  %failure2 = insertvalue %Failure { i64 24, ptr null, ptr null }, ptr %error, 2
  store %Failure %failure2, ptr %failure
  call void %destroy(ptr %failure)
  call void @leave(ptr %job)
  br label %counted
counted:
  %next_i = add i64 %i, 1
  br label %more

work:
  call void @run(ptr %job)
  %done_at = getelementptr %Job, ptr %job, i32 0, i32 2
  br label %wait
wait:                                                ; for items that helpers have begun
  %turn = phi i64 [ 0, %work ], [ %next_turn, %again ], [ %next_turn, %yield ]
  %next_turn = add i64 %turn, 1
  %done = load atomic i64, ptr %done_at acquire, align 8
  %is_done = icmp eq i64 %done, %items
  br i1 %is_done, label %end, label %again
again:
  %is_long = icmp ugt i64 %turn, 1000
  br i1 %is_long, label %yield, label %wait
yield:                                               ; a helper may have lost its core, perhaps to this thread
  %yielded = call i32 @sched_yield()
  br label %wait
end:
  call void @leave(ptr %job)
  ret ptr null
}

define private void @help(ptr %job) {                ; perhaps only when all is done and the caller has left
  call void @run(ptr %job)
  call void @leave(ptr %job)
  ret void
}

define private void @leave(ptr %job) {
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
