//! A column of numbers, in place in the bytes that it came in.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use bytes::Bytes;
use half::f16;

use super::codec::Dtype;

/// What a column can hold.
pub trait Element: bytemuck::Pod + PartialEq + fmt::Debug {
    const DTYPE: Dtype;

    /// A number from its little-endian bytes, exactly as many as it has.
    fn from_le(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($($type:ty => $dtype:ident),*) => {$(
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;

            fn from_le(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("as many bytes as the number has"))
            }
        }
    )*};
}

element!(u64 => U64, f32 => F32, f16 => F16, i8 => I8);

/// Numbers of its own, or in bytes that others share: a payload that was read, or a file that is mapped. Clones of the latter
/// share them too.
#[derive(Clone)]
pub struct Column<T> {
    held: Held<T>,
}

#[derive(Clone)]
enum Held<T> {
    Own(Vec<T>),
    /// Whole numbers, aligned.
    Shared(Bytes, PhantomData<T>),
}

impl<T: Element> Column<T> {
    /// Little-endian numbers. They stay where they are, unless they are not aligned (in a file of ours they are, see
    /// [`Dtype`]) or the machine has them the other way around.
    #[must_use]
    pub fn of(bytes: &Bytes) -> Self {
        let fits = cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, T>(bytes).is_ok();
        let held = match fits {
            true => Held::Shared(bytes.clone(), PhantomData),
            false => Held::Own(bytes.chunks_exact(size_of::<T>()).map(T::from_le).collect()),
        };
        Self { held }
    }

    /// Whether it shares the bytes that it was made of.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.held, Held::Shared(..))
    }

    /// Number `at`: as through the slice, but that only this one is looked at.
    #[inline(always)]
    #[must_use]
    pub fn number(&self, at: usize) -> T {
        match &self.held {
            Held::Own(numbers) => numbers[at],
            Held::Shared(bytes, _) => {
                let start = at * size_of::<T>();
                bytemuck::pod_read_unaligned(&bytes[start..start + size_of::<T>()])
            }
        }
    }

    /// Where number `at` is in memory, or would be, if there is none: for hints only.
    #[inline(always)]
    #[must_use]
    pub fn place(&self, at: usize) -> *const T {
        let first = match &self.held {
            Held::Own(numbers) => numbers.as_ptr(),
            Held::Shared(bytes, _) => bytes.as_ptr().cast(),
        };
        first.wrapping_add(at)
    }

    /// The numbers to change; what is shared is copied first.
    pub fn to_mut(&mut self) -> &mut Vec<T> {
        if self.is_shared() {
            self.held = Held::Own(self.to_vec());
        }
        match &mut self.held {
            Held::Own(numbers) => numbers,
            Held::Shared(..) => unreachable!("copied above"),
        }
    }
}

impl<T: Element> Deref for Column<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        match &self.held {
            Held::Own(numbers) => numbers,
            Held::Shared(bytes, _) => bytemuck::cast_slice(bytes),
        }
    }
}

impl<T> From<Vec<T>> for Column<T> {
    fn from(numbers: Vec<T>) -> Self {
        Self { held: Held::Own(numbers) }
    }
}

impl<T> Default for Column<T> {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl<T: Element> PartialEq for Column<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Element> fmt::Debug for Column<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_numbers_stay_in_place_and_others_are_the_same_numbers() {
        let numbers = [1_u64, u64::MAX, 0x0123_4567_89ab_cdef];
        // Eight places for the first byte, one of which is aligned.
        for shift in 0..8 {
            let mut bytes = vec![0; shift];
            numbers.iter().for_each(|n| bytes.extend_from_slice(&n.to_le_bytes()));
            let bytes = Bytes::from(bytes).slice(shift..);
            let column = Column::<u64>::of(&bytes);
            let aligned = bytes.as_ptr().addr().is_multiple_of(8);
            assert_eq!(column.is_shared(), aligned && cfg!(target_endian = "little"));
            assert_eq!(*column, numbers);
            assert_eq!((0..3).map(|at| column.number(at)).collect::<Vec<_>>(), numbers);
            assert_eq!(column.place(2), &raw const column[2]);
            assert!(!column.is_shared() || column.as_ptr().addr() == bytes.as_ptr().addr());
        }
    }

    #[test]
    fn changing_a_shared_column_changes_no_other() {
        let bytes = Bytes::from(vec![1, 2, 3]);
        let column = Column::<i8>::of(&bytes);
        let mut other = column.clone();
        other.to_mut().push(4);
        assert_eq!((&*column, &*other, other.is_shared()), (&[1, 2, 3][..], &[1, 2, 3, 4][..], false));
    }
}
